"""Media files to decoded pictures: opening, demuxing, faults, seek points, hangs."""
