"""What an evaluation comes to: sums over rows and ranks, exact at any number of workers.

Here: what the task measured, brought together from all ranks. Not here: which rows are measured when (`training`), a model that
was trained before (`models`).
"""
