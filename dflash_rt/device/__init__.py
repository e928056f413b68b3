"""A step that never leaves a device: its plan, the device's memory and stream, and who runs graphs."""
