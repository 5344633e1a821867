"""What every worker runs: the same loop in process, on Ray, in a trial.

Here: how a job is assembled from its parts, the steps that are left, the loop, state, stragglers. It knows no Ray: packets, the
run's store and the reporter are handed to it. Not here: how ranks exchange tensors (`parallel`), where rows come from (`data`),
how optimizers are made (`optim`), what an evaluation comes to (`evaluation`), who starts workers (`orchestration`).
"""
