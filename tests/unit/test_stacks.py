"""What is said of a run that stands still: who is the cause, and who waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymill.record import stacks
from raymill.record.folder import RunFolder
from raymill.record.stacks import RankSeen, explain, limit_s, loop_frame

DUMP = """Thread 0x1 (most recent call first):
  File "/x/threading.py", line 1 in wait

Current thread 0x2 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 99 in all_reduce
  File "/x/raymill/step.py", line 12 in averaged_gradients
  File "/x/raymill/loop.py", line 34 in step
"""


def test_the_frame_is_the_innermost_of_the_thread_that_trains() -> None:
    assert loop_frame(DUMP) == "all_reduce (distributed_c10d.py:99)"
    assert loop_frame('Thread 0x1:\n  File "/x/threading.py", line 1 in wait\n') == ""


def test_a_stopped_rank_is_the_cause_and_the_others_wait_for_it() -> None:
    seen = [RankSeen(0, 10, "running", "all_reduce (distributed_c10d.py:99)"), RankSeen(1, 11, "stopped", "")]
    text = explain(seen, 61.2, 17)
    assert text == (
        "no step for 61 s after step 17: rank 1 (process 11) is stopped; "
        "rank 0 waits for rank 1 in all_reduce (distributed_c10d.py:99)"
    )


def test_a_busy_rank_is_the_cause_when_none_is_stopped() -> None:
    seen = [RankSeen(0, 10, "running", "sleep (task.py:3)"), RankSeen(1, 11, "running", "recv (step.py:9)")]
    assert "rank 0 (process 10) is busy in sleep (task.py:3); rank 1 waits for rank 0" in explain(seen, 60, 1)


def test_the_first_step_may_take_longer() -> None:
    assert limit_s(60, first_step_done=True) == 60
    assert limit_s(60, first_step_done=False) == 300


WAITS = """
import sys, threading
from pathlib import Path
from raymill import stall
from raymill.home import RunFolder
stall.announce(RunFolder(Path(sys.argv[1])), 0)
print("there", flush=True)
threading.Event().wait()
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", WAITS, str(tmp_path)], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        started.stdout.readline()
        yield started
        started.kill()


def test_stacks_of_a_process_are_had_from_outside_and_a_stopped_or_dead_one_is_seen(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    folder = RunFolder(tmp_path)
    assert [rank.status for rank in stacks.look(folder, 2)] == ["running", "not started"]
    assert "most recent call first" in (tmp_path / "stacks-0.txt").read_text()
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    assert stacks.look(folder, 1)[0].status == "stopped"
    process.kill()
    process.wait()
    assert stacks.look(folder, 1)[0].status == "gone"
