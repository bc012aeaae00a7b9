"""Decoded pictures to upright RGB frames of one size."""
