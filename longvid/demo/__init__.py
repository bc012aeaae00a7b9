"""A short clip to try the package with."""
