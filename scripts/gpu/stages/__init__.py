"""The stages of `scripts/gpu/run.py`: each is a module with a function `run(stage)`."""
