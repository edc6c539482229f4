"""The trainer that the launcher starts on each rank. Imports torch."""
