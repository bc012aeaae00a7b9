"""longvid: arbitrarily long video through a cached causal-conv VAE, in bounded memory, to and from zarr."""

__version__ = "0.1.0"
