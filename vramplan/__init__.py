"""vramplan: says before launch whether a fine-tuning job fits, and plans, runs and measures it."""

__version__ = "0.1.0"
