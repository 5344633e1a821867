"""Where files lie, near or far: a folder of this machine, or an address such as s3://bucket/folder.

Belongs here: listing, reading and telling versions of a file apart, with what goes wrong on the way. Does not: what is in a file.
"""
