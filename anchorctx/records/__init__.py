"""What runs leave on disk, and how it is read again: manifests, result rows, and the statistics over them."""
