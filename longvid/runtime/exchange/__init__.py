"""Latents that other programs made, or want: files of them, and stores that are made of them."""
