"""The draft/verify loop and the state of a sequence."""
