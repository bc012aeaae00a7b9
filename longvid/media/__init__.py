"""Pixels: video files, arrays and iterables as sources of frames, and video files as outputs."""
