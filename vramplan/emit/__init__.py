"""A run translated to what other tools read: DeepSpeed's config, launch commands."""
