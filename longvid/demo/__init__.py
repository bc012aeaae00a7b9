"""A short clip to try the package with, and what is shown with it."""
