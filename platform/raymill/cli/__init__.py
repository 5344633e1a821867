"""The command line: parse, call one function, print, exit code.

Here: one file per group of verbs, and what they share (`output`). Not here: anything that Python cannot do as well
(`raymill.api`).
"""

from raymill.cli.app import main

__all__ = ["main"]
