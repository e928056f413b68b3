"""Target configurations: read, checked, refused."""
