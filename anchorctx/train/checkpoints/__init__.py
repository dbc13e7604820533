"""Checkpoints: whole or not there, with a digest of every file, and nothing in them that could run as code."""
