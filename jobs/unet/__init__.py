"""Nuclei told from what is around them, pixel by pixel."""
