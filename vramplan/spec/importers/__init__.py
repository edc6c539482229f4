"""Other tools' configs read as specs."""
