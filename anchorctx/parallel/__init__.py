"""Processes and memory: the process group, and a loss that never holds a row's logits."""
