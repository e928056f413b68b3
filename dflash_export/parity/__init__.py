"""Proof of parity: a bundle against PyTorch."""
