"""Drafter configurations, one file per format, and the modules that only some drafters have."""
