"""From torch modules to the ONNX graphs of a bundle."""
