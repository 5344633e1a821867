"""Handwritten digits: the main job."""
