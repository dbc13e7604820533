"""Figures, each drawn once with matplotlib: as SVG in the report's page, and as PNG on disk."""
