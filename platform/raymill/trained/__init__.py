"""A trained model as files: weights with the job that trained them, verified at every load; and the models that a job is given.

Here: what such files are and how a model is made of them again. Not here: where a model is found by its name (`models`), what it
is asked (`models/predict`), how one is trained (`training`).
"""
