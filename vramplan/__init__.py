"""vramplan: says before launch whether a fine-tuning job fits, and plans, runs and measures it."""

from vramplan.version import __version__

__all__ = ["__version__"]
