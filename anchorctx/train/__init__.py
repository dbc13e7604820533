"""Training under DeepSpeed: engine, loop, checkpoints and export."""
