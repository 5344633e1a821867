"""From a job file to a plan: a job is read, checked and turned into numbers, before anything starts.

Here: the typed spec, strict YAML, code looked up by reading its source, the plan with a reason for each number. No torch, no
Ray, no MLflow: `raymill check` answers in well under a second. Not here: what a plan is carried out with (`orchestration`).
"""
