"""What `scripts/chaos.py` does to the commands: a module a kind of attack."""
