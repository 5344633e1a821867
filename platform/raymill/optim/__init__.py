"""How weights change once gradients are known: optimizers by groups of parameters, schedules of their rates, averages of weights.

Here: what the job file says of these, made into torch's objects or the job's own. Not here: how gradients come about
(`parallel`), when a step is taken (`training`).
"""
