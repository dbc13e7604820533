"""Evaluations of Hugging Face folders: what a checkpoint is worth."""
