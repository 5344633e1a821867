"""Which rows, in which order, and how they get to a rank.

Here: the order of samples as a pure function, the manifest of the input, sources (one file a format), the reader of windows, Ray
Data's part, the feed on the worker. Not here: how rows become tensors (`training.batch`). Ray Data is used in `ray_stream` alone.
"""
