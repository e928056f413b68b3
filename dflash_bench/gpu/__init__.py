"""Parity and speed on a GPU, in one run that ends in time."""
