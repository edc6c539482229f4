"""Measured memory: its record form, the probe that takes it, comparison with estimates."""
