"""raymill: distributed PyTorch training on Ray, with no row lost, repeated or reordered.

    import raymill

    job = raymill.load("mnist", loop__epochs=2)      # a job file, its folder or its name, and overrides
    job.check()                                      # everything that is wrong, at once
    job.plan()                                       # every derived number, with its reason
    run = job.train(in_process=True)                 # or on Ray
    run.history()                                    # its metrics as a pandas DataFrame
    raymill.runs()                                   # all runs of the project
    raymill.model("mnist@candidate").predict(rows)

What a job's own code imports stands in `raymill.task` and `raymill.data.sources`. Importing this package imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymill.api import Job, Model, Run, load, model, registered_models, resume, run, runs

__all__ = ["Job", "Model", "Run", "load", "model", "registered_models", "resume", "run", "runs"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from raymill import api

        return getattr(api, name)
    raise AttributeError(f"module 'raymill' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
