"""The version of the Python files; the compiled library keeps the one it was built with."""

__version__ = "0.1.0"
