"""The job's own code, seen from the engine: where it is called, what it must give back, and its errors told from its own lines.

Here: what is the same in a run and in its preflight. Not here: what is done with what it gives (`training`, `data`), and what is
tried before a run (`preflight`).
"""
