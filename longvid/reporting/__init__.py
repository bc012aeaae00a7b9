"""What people see: progress bar, recordings, report pages."""
