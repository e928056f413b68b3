"""Which weights go into which data file, and their streaming."""
