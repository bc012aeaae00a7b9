"""Frames in and out: sources of uint8 frames with time stamps, and writers of video files. No torch here."""
