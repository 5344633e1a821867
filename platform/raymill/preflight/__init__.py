"""The job's own code tried on a few rows before a run, so that its mistakes are found in seconds, with their lines.

Here: what is tried, and a process of its own for it. Not here: what the code must give (`own_code.contracts`), which a run holds
it against too; and what is known without running any of it (`config`).
"""
