"""Ray's errors -> the one that explains a failed training."""

from __future__ import annotations

import pickle

import ray.exceptions
import torch
from ray.train import WorkerGroupError

from raymill.errors import DataError, InputError, Interrupted, Problem, WorkerError
from raymill.orchestration.on_ray.root_cause import root_cause
from raymill.orchestration.retry import Cause

GONE = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1")


def cause_of(failures: dict[int, Exception]) -> WorkerError:
    found = root_cause(WorkerGroupError("training failed", failures))
    assert isinstance(found, WorkerError)
    return found


def test_our_own_error_from_any_rank_explains_all_others() -> None:
    wrapped = ray.exceptions.RayTaskError("f", "traceback", DataError("part-00002"))
    found = root_cause(WorkerGroupError("training failed", {0: GONE, 2: wrapped.as_instanceof_cause()}))
    assert isinstance(found, DataError)
    assert str(found) == "part-00002"


def test_a_rank_that_is_gone_explains_those_that_lost_it() -> None:
    found = cause_of({0: GONE, 1: ray.exceptions.ActorDiedError()})
    assert (found.rank, found.cause) == (1, Cause.LOST_PROCESS)


def test_a_rank_that_needs_a_process_which_has_no_node_any_more_is_tried_again() -> None:
    found = cause_of({0: ValueError("shapes do not fit"), 1: ray.exceptions.ActorUnschedulableError("the node is gone")})
    assert (found.rank, found.cause) == (1, Cause.LOST_PROCESS)


def test_memory_that_was_refused_or_taken_too_much_is_not_tried_again() -> None:
    refused = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    killed = ray.exceptions.OutOfMemoryError("Task was killed. Memory on the node was low")
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), refused, killed):
        found = cause_of({0: GONE, 1: error})
        assert (found.rank, found.cause) == (1, Cause.MEMORY), error
        assert "Lower loop.global_batch_rows" in str(found)


def test_an_error_of_the_jobs_code_comes_with_its_rank_and_words_and_is_not_tried_again() -> None:
    found = cause_of({0: GONE, 1: ValueError("shapes do not fit")})
    assert (found.rank, found.cause) == (1, Cause.CODE)
    assert str(found) == "rank 1 failed: ValueError: shapes do not fit"


def give_advice(error: Exception) -> None:
    """As Ray Data does with what is raised in its tasks."""
    advice = (
        "Failed to map after 1/1 attempts (total backoff 0.0s).\nTo change retry attempts, backoff, or which errors are retried, "
        "configure `ray.data.DataContext.get_current()` if you believe this to be transient."
    )
    first, *others = error.args
    error.args = (f"{first}\n{advice}", *others) if isinstance(first, str) else (*error.args, advice)


def test_ray_datas_own_advice_is_not_the_message() -> None:
    error = ValueError("no luck")
    give_advice(error)
    wrapped = ray.exceptions.RayTaskError("f", "traceback", error)
    assert "configure `ray.data.DataContext" in str(error)
    assert str(cause_of({1: wrapped.as_instanceof_cause()})) == "rank 1 failed: ValueError: no luck"


def test_an_error_of_ours_is_the_same_whatever_ray_data_adds_to_it() -> None:
    problem = Problem("a", "b", "c", "d")
    for error in (DataError("no luck"), InputError([problem]), WorkerError("no luck", 1, "trace", "code"), Interrupted("run", 3)):
        error.add_note("split 'train'")
        said = str(error)
        give_advice(error)
        there = pickle.loads(pickle.dumps(error))
        assert (type(there), str(there), there.__notes__) == (type(error), said, ["split 'train'"])
        assert there.values == error.values
