"""How a model is spread over ranks: the process group, DistributedDataParallel, precision.

Here: everything that knows ranks and nothing of runs, data or jobs. Not here: the step that uses it (`training`).
"""
