"""The share of waiting for data where reading happens in Ray Data's tasks, held against what the job's own code saw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import median

import pytest

from integration.commands import PROJECT, Home
from raymill.record.events import StepDone, read_events

pytestmark = pytest.mark.integration

READ_S, LOSS_S = 0.3, 0.05
FREE_STEPS = 12

TASK = '''
import json, os, time
from pathlib import Path
from jobs.smoke.task import Blobs

class Slow(Blobs):
    """Each step takes its time on the last rank; each writes down when its forward passes began and ended."""

    def __init__(self, schema, notes: str, loss_s: float) -> None:
        super().__init__(schema)
        self.notes, self.loss_s, self.calls = Path(notes), loss_s, []

    def loss(self, model, batch):
        import torch.distributed as dist

        begun_s = time.time()
        if dist.get_rank() == dist.get_world_size() - 1:
            time.sleep(self.loss_s)
        loss = super().loss(model, batch)
        with open(self.notes / f"rank-{dist.get_rank()}", "a") as file:
            file.write(json.dumps([begun_s, time.time()]) + "\\n")
        return loss
'''

PIPELINE = '''
import fcntl, os, time
from dataclasses import replace
from functools import partial
from pathlib import Path
from pipelines.synthetic import blobs
from raymill.task import Pipeline

FREE_WINDOWS = 16  # at least as many as are read at once: the first one must be among them

def slow_blobs(notes: str, read_s: float, num_rows: int) -> Pipeline:
    return replace(blobs(num_rows=num_rows), transform=partial(one_at_a_time, Path(notes), read_s))

def one_at_a_time(notes, read_s, rows, split, generator):
    """One window after the other, and but for the first few none before the first step: the wait for it would be over by then."""
    with open(notes / "windows", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_size >= FREE_WINDOWS:
            while not (notes / "rank-0").exists():
                time.sleep(0.01)
            time.sleep(read_s)
        file.write(".")
        file.flush()
    return rows
'''

JOB = """
name: slow
task: jobs.slow.task:Slow
pipeline: pipelines.slow:slow_blobs
model: {{notes: {notes}, loss_s: {loss_s}}}
data: {{notes: {notes}, read_s: {read_s}, num_rows: 1800}}
optimizer: {{kind: SGD, lr: 0.1}}
loop: {{epochs: 1, global_batch_rows: 50, window_rows: 50}}
scale: {{workers: 2}}
"""


@pytest.mark.long
def test_the_share_of_waiting_on_ray_is_the_true_one(tmp_path: Path) -> None:
    root, notes = tmp_path / "project", tmp_path / "notes"
    notes.mkdir()
    for folder in ("jobs", "pipelines"):
        shutil.copytree(PROJECT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pyproject.toml").write_text("")
    (root / "jobs" / "slow").mkdir()
    (root / "jobs" / "slow" / "__init__.py").touch()
    (root / "jobs" / "slow" / "task.py").write_text(TASK)
    (root / "pipelines" / "slow.py").write_text(PIPELINE)
    (root / "jobs" / "slow" / "job.yaml").write_text(JOB.format(notes=notes, loss_s=LOSS_S, read_s=READ_S))

    home = Home(tmp_path / "home", root)
    # Its loss asks for its rank, which there is only on workers.
    summary = home.json("train", "slow", "--json", "--no-preflight")
    num_steps = summary["steps"]
    ranks = [[json.loads(line) for line in (notes / f"rank-{rank}").read_text().splitlines()[-num_steps:]] for rank in (0, 1)]
    begun_s = [max(rank[step][0] for rank in ranks) for step in range(num_steps)]
    ended_s = [max(rank[step][1] for rank in ranks) for step in range(num_steps)]
    # From the last forward pass of a step to the last one's beginning in the next: exchange, optimizer, rows. How long that takes
    # with all rows there, the first steps say, whose windows were read freely; what it takes longer later is waiting.
    gaps_s = [begun - ended for ended, begun in zip(ended_s[:-1], begun_s[1:], strict=True)]
    usual_s = median(gaps_s[:FREE_STEPS])
    true = sum(max(0.0, gap_s - usual_s) for gap_s in gaps_s) / (begun_s[-1] - begun_s[0])
    assert 0.3 < true < 0.9, "the sleeps are what takes the time"
    assert summary["data_wait_share"] == pytest.approx(true, abs=0.05)
    steps = [event for event in read_events(home.folder().events)[0] if isinstance(event, StepDone)]
    assert steps[-1].data_wait_share == pytest.approx(summary["data_wait_share"], abs=0.01)
