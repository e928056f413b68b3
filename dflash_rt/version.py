"""The one place that holds the version of both packages."""

__all__ = ["__version__"]

__version__ = "0.1.0"
