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

LOOKALIKE = """
import os

def train(ready, lock):
    os.write(ready, b"x"); lock.acquire()
"""

# One thread is in the real training loop, one in a file of nearly the same name, and the main thread in neither.
TRAINS = """
import faulthandler, os, sys, threading
from raymill.training import loop
from training import loop as lookalike

by_itself, by_another = (faulthandler.dump_traceback, int) if sys.argv[1] == "itself" else (int, faulthandler.dump_traceback)
lock = threading.Lock()
lock.acquire()

class StandsStill:
    def __getattr__(self, name):
        by_itself(); os.write(ready, b"x"); lock.acquire()  # here

def start(function, *args):
    threading.Thread(target=function, args=args, daemon=True).start()
    os.read(there, 1)

there, ready = os.pipe()
start(lookalike.train, ready, lock)
start(loop.train, StandsStill(), None, None, iter(()), print, bool)
by_another()
os._exit(0)
"""


@pytest.mark.parametrize("dumped_by", ["itself", "another"])
def test_the_frame_is_the_innermost_of_the_thread_that_is_in_the_training_loop(dumped_by: str, tmp_path: Path) -> None:
    script, lookalike = tmp_path / "task.py", tmp_path / "training" / "loop.py"
    lookalike.parent.mkdir()
    lookalike.write_text(LOOKALIKE)
    script.write_text(TRAINS)
    done = subprocess.run([sys.executable, str(script), dumped_by], capture_output=True, text=True, check=True)
    assert done.stderr.count("most recent call first") == 3
    assert str(lookalike) in done.stderr
    here = next(number for number, line in enumerate(TRAINS.splitlines(), start=1) if "# here" in line)
    assert loop_frame(done.stderr) == f"__getattr__ (task.py:{here})"


def test_without_a_thread_in_the_training_loop_there_is_no_frame() -> None:
    dump = 'Thread 0x1 (most recent call first):\n  File "/elsewhere/raymill/training/loop.py", line 1 in train\n'
    assert loop_frame(dump) == ""
    assert loop_frame("") == ""


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
from raymill.record import stacks
from raymill.record.folder import RunFolder
stacks.announce(RunFolder(Path(sys.argv[1])), 0)
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
    assert stacks.look(folder, 1) == [RankSeen(0, process.pid, "running", "")]
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    assert stacks.look(folder, 1)[0].status == "stopped"
    process.kill()
    process.wait()
    assert stacks.look(folder, 1)[0].status == "gone"
