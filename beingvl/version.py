"""The package's version, in a file that any module may import."""

__version__ = "0.1.0"
