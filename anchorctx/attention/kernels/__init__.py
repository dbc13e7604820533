"""Thin adapters to flash kernels, one file each; see `base.Kernel`."""
