"""Ray clusters by name, and runs that are submitted to one.

Here: what a file of cluster/ says; nodes on this machine and their MLflow server, started and ended; jobs of Ray that are
raymill's runs.
Not here: how a run uses a cluster that is there (`orchestration/on_ray`).
"""
