"""Pictures in files of their own as sources: names, what the bytes hold, frames."""
