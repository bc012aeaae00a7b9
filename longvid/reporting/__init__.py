"""What users see of a run: progress bar, recordings and report pages."""
