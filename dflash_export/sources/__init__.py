"""Where models come from, and their tensors, one at a time."""
