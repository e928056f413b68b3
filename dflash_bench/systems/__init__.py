"""What a benchmark compares: this project's own decoding, and baselines."""
