"""Pixels: video files, arrays and iterables as frames with time stamps, and frames as video files."""
