"""Documents to token ids, on disk."""
