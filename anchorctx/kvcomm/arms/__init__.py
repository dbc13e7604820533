"""The ways to reuse a KV cache, and the controls beside them."""
