"""Clothes told apart by a network that is trained from scratch."""
