"""What runs in the sandbox's processes, started as `python -I FOLDER`: it imports nothing of the package."""
