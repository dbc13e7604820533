"""Where documents come from: files, datasets, the embedded corpus."""
