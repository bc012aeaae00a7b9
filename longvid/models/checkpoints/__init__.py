"""Weights as people have them: files in a folder, one file with original names, tensors of an instance."""
