"""Rows that are lines of text.

Here: pieces of files that end where lines end, and what is made of a piece: text, JSON, CSV. Not here: formats with an index of
their own (`data/sources`).
"""
