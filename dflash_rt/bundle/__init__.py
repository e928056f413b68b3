"""What lies on disk: the manifest, the graph contract, and the folder that holds them."""
