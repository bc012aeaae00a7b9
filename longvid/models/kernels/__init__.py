"""What the layers compute with: convolutions, Winograd filtering along time, and norms on CUDA."""
