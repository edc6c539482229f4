"""Text to batches: sources, templates, packing, sampling. Imports torch."""
