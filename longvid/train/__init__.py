"""Training of ``tiny`` on a folder of videos: ``python -m longvid.train``."""
