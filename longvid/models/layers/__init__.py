"""Layers that the families are built from; each takes the forward context in its call and keeps nothing."""
