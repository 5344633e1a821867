"""Where files lie, near or far: a folder of this machine, or an address such as s3://bucket/folder.

Here: listing, reading and telling versions of a file apart, with what goes wrong on the way. Not here: what is in a file
(`data/sources`), a run's own folder (`record`).
"""
