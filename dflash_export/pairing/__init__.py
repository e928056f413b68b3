"""Whether a target and a drafter belong together."""
