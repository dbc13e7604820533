"""Triton kernels for what is bound by memory: one file each, imported only where it is called.

Each does in one pass over 16-bit tensors what torch's operators do in several, and is tested against those.
"""
