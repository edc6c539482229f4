"""Arithmetic of time: flops, traffic, seconds of a step."""
