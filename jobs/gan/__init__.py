"""Digits made out of noise, by two networks that play against each other."""
