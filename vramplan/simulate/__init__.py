"""The real model and engine on fake tensors. Imports torch."""
