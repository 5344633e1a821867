"""Layers and a gradient of our own, in a network that is trained."""
