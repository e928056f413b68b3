"""What a slot keeps between steps, and how it is rolled back."""
