"""Digits through a few numbers and back: a variational autoencoder."""
