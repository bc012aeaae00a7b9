"""Bytes on disk: zarr stores of latents and of frames, written, read and verified."""
