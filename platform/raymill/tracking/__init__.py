"""MLflow as the place where runs are looked at.

Here: how the store is opened, how a run's events are delivered to it, the pictures among its artifacts, its page. Not here: model
versions (`models`), and the process that delivers (`orchestration.tracker`).
"""
