"""Causal video VAEs: the protocol, the layers, one file per family, and loading."""
