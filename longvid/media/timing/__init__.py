"""Times of frames: one rising clock for every file, and other frame rates."""
