"""Targets and drafters in 4 and 8 bits."""
