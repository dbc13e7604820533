"""Documents to packed rows, and rows to batches."""
