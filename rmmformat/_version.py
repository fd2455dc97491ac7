"""Version of the library; that of the format is in the specification."""

__all__ = ["__version__"]

__version__ = "0.1.0"
