"""The width that adapts against fixed ones."""
