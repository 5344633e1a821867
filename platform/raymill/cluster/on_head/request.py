"""What a cluster does for a run that is submitted: puts its code in place, and sees to it that somebody acts on the line.

    python -m raymill.cluster.on_head.request

Ray removes what was sent with a job once any process of the same code has ended, though others go on; a run has many processes,
one after the other, and waits before its first. So the project and raymill itself are copied into the state folder of the head.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from raymill.cluster.on_head import head

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray says what a job was submitted with. A process that connects to Ray by itself takes it for its own."""


def main() -> int:
    """Returns 0: it is in place."""
    code = head.code_of(json.loads(os.environ.pop(JOB_CONFIG))["runtime_env"])
    head.put_in_place(code, Path.cwd())
    if not head.somebody_acts() or not head.queue_imports(head.engine_of(code)):
        # Imported here: mostly there is no need, and it takes a while.
        from raymill.cluster.on_head import queue

        queue.ensure(head.engine_of(code))
    return 0


if __name__ == "__main__":
    sys.exit(main())
