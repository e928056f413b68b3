"""How many rows the next step verifies, and what steps cost."""
