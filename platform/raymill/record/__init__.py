"""The record of a run: what stands in its folder, and who may write it from where.

Here: the names of the files, the typed events, the store that workers use (near or far), the list of bad rows, stacks of ranks,
what all runs of a project say. Whoever wants to know about a run reads these files; nobody asks a process. Not here: MLflow
(`tracking`), who starts and ends attempts (`orchestration`).
"""
