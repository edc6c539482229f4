"""Arithmetic of bytes: named terms, and the moments at which they are alive together."""
