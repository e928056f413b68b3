"""What a benchmark compares: our own decoding, and baselines."""
