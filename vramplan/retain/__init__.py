"""Methods against forgetting, one file each. Imports torch."""
