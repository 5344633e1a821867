"""Searches over a job's fields: Ray Tune runs the trials, Optuna suggests what they try, and keeps the study.

Here: the space and its corners, the study, a trial as an ordinary run of raymill, the process that drives a search. Not here: how
one run is trained (`orchestration`), what stands in a job's `search:` (`config/search`).
"""
