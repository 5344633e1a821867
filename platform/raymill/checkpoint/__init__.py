"""A training state on disk, whole or not at all.

Here: what a snapshot is, the folder it becomes, the commit that makes it the newest, and the thread that does so while
training goes on. Not here: how a state is taken from a model and put back (`training.state`), or which runs there are (`record`).
"""
