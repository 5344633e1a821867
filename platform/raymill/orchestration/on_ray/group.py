"""The workers that an attempt needs, as far as Ray is concerned: what can be started before anybody knows the run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from raymill.config.plan import Plan
from raymill.config.spec import JobSpec
from raymill.files import read_record
from raymill.record.folder import RunFolder

GROUP = "--group"
"""Before a group in the command line of a driver that does not know its run yet."""


@dataclass(frozen=True)
class Group:
    """The workers of an attempt.

    Attributes:
        num_workers: at most.
        min_workers: at least; fewer where the run is elastic.
        cpus, gpus: of each.
        resize_check_s: how often an elastic group looks for more room; None: it is not elastic.
    """

    num_workers: int
    min_workers: int
    cpus: float
    gpus: int
    resize_check_s: float | None = None

    @staticmethod
    def of(plan: Plan, spec: JobSpec) -> Group:
        """What a planned job needs."""
        check_s = spec.scale.resize_check_s if spec.scale.elastic else None
        return Group(plan.num_workers, plan.min_workers, plan.worker_cpus, spec.scale.gpus_per_worker, check_s)

    @property
    def each(self) -> dict[str, float]:
        """Resources of a worker, by the names that Ray has for them."""
        return {"CPU": self.cpus, **({"GPU": float(self.gpus)} if self.gpus else {})}

    def as_text(self) -> str:
        """In one line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> Group:
        """The same, read back."""
        return Group(**json.loads(text))


def planned_run(folder: RunFolder) -> tuple[Plan, JobSpec]:
    """What a run's folder says that is to be done."""
    return Plan.from_record(read_record(folder.plan)), JobSpec.model_validate(read_record(folder.spec))
