"""Systems on a bundle, interleaved in one run."""
