"""One run from the command to its end.

Here: a job is prepared, handed to an executor (this process, a supervised driver on this machine, a Ray cluster), watched, tried
again, summed up; Ray is started and Ray Train called. Not here: what a worker computes (`training`), what MLflow is told
(`tracking`), what the command line prints (`cli`).
"""
