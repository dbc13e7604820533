"""The precision study: how far each arithmetic breaks RoPE's relativity, on a checkpoint of the user's own."""
