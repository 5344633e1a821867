"""A trained model: what is registered, what it measures, what it says of new rows.

Here: model versions in MLflow's registry, the weights of a run or a version (verified at every load), evaluation, prediction.
Not here: how a model is trained (`training`), how a run's metrics get to MLflow (`tracking`).
"""
