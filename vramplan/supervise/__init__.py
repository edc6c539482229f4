"""Start the trainer as a process, watch it, and say why it ended."""
