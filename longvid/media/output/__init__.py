"""Frames to media files."""
