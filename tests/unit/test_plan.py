"""Every number follows from the job, the data and the machine, has its reason, and what cannot run is refused with a way out."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from raymill.config.plan import ClusterFacts, Plan, batch_shardings, explain, job_order, make_plan
from raymill.config.spec import JobSpec
from raymill.data.manifest import Manifest, SplitManifest
from raymill.data.order import BatchSharding, num_batches
from raymill.errors import InputError
from raymill.task import TRAIN, VALIDATION, Fragment

MIB = 2**20


def manifest_of(**rows: int) -> Manifest:
    """Splits of so many rows, in fragments of up to 100, of 1000 bytes a row."""

    def fragments(count: int) -> tuple[Fragment, ...]:
        sizes = [min(100, count - start) for start in range(0, count, 100)]
        return tuple(Fragment("file", part, size, 1000 * size, "") for part, size in enumerate(sizes))

    return Manifest({split: SplitManifest(fragments(count)) for split, count in rows.items()})


def job(**sections: Any) -> JobSpec:
    optimizer = {"kind": "SGD", "lr": 0.1}
    return JobSpec.model_validate({"name": "job", "task": "-", "pipeline": "-", "optimizer": optimizer, **sections})


def facts(num_cpus: float = 8, num_gpus: float = 0, memory_bytes: int = 8 * 2**30) -> ClusterFacts:
    return ClusterFacts(num_cpus=num_cpus, num_gpus=num_gpus, memory_bytes=memory_bytes)


def plan_of(machine: ClusterFacts | None = None, rows: int = 1000, **sections: Any) -> Plan:
    return make_plan(job(**sections), manifest_of(train=rows, validation=200), machine or facts())


def shardings(plan: Plan, ranks: int) -> Mapping[str, BatchSharding]:
    manifest = manifest_of(train=plan.train_rows, validation=plan.validation_rows)
    return batch_shardings(plan, job_order(job(), plan, manifest), ranks)


def refusals(
    machine: ClusterFacts | None = None, manifest: Manifest | None = None, **sections: Any
) -> list[tuple[str, str, str, str]]:
    with pytest.raises(InputError) as caught:
        make_plan(job(**sections), manifest or manifest_of(train=1000), machine or facts(), lambda field: f"job.yaml {field}")
    return [(problem.where, problem.found, problem.expected, problem.fix) for problem in caught.value.problems]


# ---------------------------------------------------------------- numbers


def test_steps_count_the_small_last_one() -> None:
    plan = plan_of(rows=1010, loop={"epochs": 3, "global_batch_rows": 100})
    assert (plan.train_rows, plan.validation_rows) == (1010, 200)
    assert (plan.steps_per_epoch, plan.total_steps) == (11, 33)
    assert "the last step has 10 rows" in plan.reasons["steps_per_epoch"]
    even = plan_of(rows=1000, loop={"global_batch_rows": 100})
    assert even.steps_per_epoch == 10
    assert "last step" not in even.reasons["steps_per_epoch"]


def test_a_checkpoint_comes_once_per_epoch_unless_said_otherwise() -> None:
    assert plan_of(loop={"global_batch_rows": 100}).checkpoint_every_steps == 10
    assert plan_of(checkpoint={"every_steps": 7}).checkpoint_every_steps == 7


@pytest.mark.parametrize(
    ("num_cpus", "workers", "worker_cpus", "data_cpus"),
    [(8, 2, 1.0, 6.0), (3, 2, 1.0, 1.0), (2, 2, 0.5, 1.0), (2, 1, 1.0, 1.0), (1, 1, 0.5, 0.5), (4, 6, 0.5, 1.0)],
)
def test_cpus_are_shared_between_workers_and_reading(num_cpus: float, workers: int, worker_cpus: float, data_cpus: float) -> None:
    plan = plan_of(facts(num_cpus), loop={"global_batch_rows": 60}, scale={"workers": workers})
    assert (plan.worker_cpus, plan.data_cpus) == (worker_cpus, data_cpus)


def test_given_cpus_and_threads_are_taken() -> None:
    plan = plan_of(facts(8), scale={"workers": 2, "cpus_per_worker": 3}, loop={"threads": 5})
    assert (plan.worker_cpus, plan.data_cpus, plan.threads) == (3, 2, 5)
    assert plan.reasons["worker_cpus"] == plan.reasons["threads"] == "given"
    assert plan_of(facts(8), scale={"workers": 2}).threads == 4
    assert plan_of(facts(1), scale={"workers": 2}).threads == 1


@given(num_cpus=st.floats(0.5, 300).map(lambda number: round(number, 2)), workers=st.integers(1, 400))
def test_workers_and_readers_never_ask_for_more_than_there_is(num_cpus: float, workers: int) -> None:
    spec = job(loop={"global_batch_rows": workers}, scale={"workers": workers})
    try:
        plan = make_plan(spec, manifest_of(train=1000), facts(num_cpus))
    except InputError:
        assert workers * 0.01 + min(1, num_cpus / 2) > num_cpus - 1e-6
        return
    assert plan.worker_cpus > 0
    assert plan.data_cpus >= plan.read_task_cpus > 0
    assert workers * plan.worker_cpus + plan.data_cpus <= num_cpus + 0.01


def test_windows_are_of_16_mib_an_eighth_of_an_epoch_or_four_batches() -> None:
    small = plan_of(rows=10_000, loop={"global_batch_rows": 100})
    assert (small.window_rows, small.train_windows, small.validation_windows) == (1250, 8, 1)
    large = plan_of(rows=400_000, loop={"global_batch_rows": 100})
    assert large.window_rows == 16 * MIB // 1000
    assert large.train_windows == num_batches(400_000, large.window_rows)
    wide = plan_of(rows=10_000, loop={"global_batch_rows": 1000})
    assert wide.window_rows == 4000
    tiny = plan_of(rows=100, loop={"global_batch_rows": 64})
    assert (tiny.window_rows, tiny.train_windows) == (100, 1)
    assert plan_of(loop={"window_rows": 77}).window_rows == 77


def test_a_window_is_at_most_256_mib_of_source_whatever_a_batch_is() -> None:
    fragment = Fragment("large", 0, 100, 100 * 8 * MIB, "-")
    plan = make_plan(job(loop={"global_batch_rows": 64}), Manifest({TRAIN: SplitManifest((fragment,) * 10)}), facts())
    assert plan.window_rows == 256 // 8


def test_what_becomes_large_by_the_transform_is_transformed_in_chunks_and_a_run_keeps_its_own() -> None:
    spec, manifest = job(loop={"global_batch_rows": 64}), manifest_of(train=100_000)
    small = make_plan(spec, manifest, facts(), row_bytes=128 * MIB // 12_500)
    assert (small.window_rows, small.chunk_rows) == (12_500, 0)
    large = make_plan(spec, manifest, facts(), row_bytes=12 * MIB)
    assert (large.window_rows, large.chunk_rows) == (12_500, 5)
    assert make_plan(spec, manifest, facts(), row_bytes=2**40).chunk_rows == 1
    kept = make_plan(spec, manifest, facts(), row_bytes=MIB, before=dataclasses.replace(large, window_rows=777))
    assert (kept.window_rows, kept.chunk_rows) == (777, 5)
    assert make_plan(spec, manifest, facts()).chunk_rows == 0


@pytest.mark.parametrize(("memory_bytes", "expected"), [(2**30, 256 * MIB), (8 * 2**30, int(0.8 * 2**30)), (2**40, 2 * 2**30)])
def test_shared_memory_is_a_tenth_within_bounds(memory_bytes: int, expected: int) -> None:
    assert plan_of(facts(memory_bytes=memory_bytes)).object_store_bytes == expected


JOBS: dict[str, dict[str, Any]] = {
    "fixed": {"scale": {"workers": 2}},
    "elastic": {"scale": {"min_workers": 1, "max_workers": 3}},
    "strict": {"loop": {"strict": True}, "scale": {"workers": 2}, "bad_rows": {"policy": "skip"}},
}
SPLITS = {"with validation": {"train": 1000, "validation": 200}, "without validation": {"train": 1000}}


@pytest.mark.parametrize("rows", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("sections", JOBS.values(), ids=JOBS)
def test_every_number_of_a_plan_is_explained_and_plain_json(sections: dict[str, Any], rows: dict[str, int]) -> None:
    plan = make_plan(job(**sections), manifest_of(**rows), facts())
    record = json.loads(json.dumps(plan.as_record()))
    assert Plan.from_record(record) == plan
    numbers = {field.name for field in dataclasses.fields(Plan)} - {"reasons"}
    assert record.keys() == {*numbers, "reasons"}
    assert plan.reasons.keys() == numbers
    shown = {name: (value, reason) for name, value, reason in explain(plan)}
    assert shown.keys() == numbers
    for name, (value, reason) in shown.items():
        assert float(value) == pytest.approx(record[name], rel=1e-5), name
        assert re.search(r"[a-z]{3}", reason), f"the reason of {name} is no sentence: {reason!r}"
        assert not re.search(r"None|nan|<|\{|\bTrue\b|\bFalse\b", reason), f"the reason of {name}: {reason!r}"


def test_the_reasons_of_a_fixed_an_elastic_and_a_strict_job_differ_where_the_numbers_do() -> None:
    fixed, elastic, strict = (plan_of(**sections).reasons for sections in JOBS.values())
    assert fixed["num_workers"] == strict["num_workers"] == "scale.workers"
    assert fixed["worker_cpus"] == "8 CPUs are enough for 1 each and 1 for reading data"
    assert fixed["strict_shards"] == "not strict: shards follow the workers"
    assert fixed["bad_rows_budget"] == "bad_rows.policy is fail"
    assert elastic["num_workers"] == "what the cluster has room for, from scale.min_workers to scale.max_workers"
    assert elastic["min_workers"] == "scale.min_workers"
    assert elastic["read_task_cpus"].startswith("0, because")
    assert strict["strict_shards"] == "the same at any number of workers"
    assert strict["bad_rows_budget"] == "1 % of 1000 training rows, rounded up"
    assert strict["threads"].startswith("1, because")


def test_a_split_that_is_not_there_is_the_reason_for_no_validation() -> None:
    with_validation = plan_of().reasons
    without = make_plan(job(), manifest_of(train=1000), facts()).reasons
    assert with_validation["validation_rows"] == "the manifest: 2 fragments"
    assert without["validation_rows"] == without["validation_windows"] == "the pipeline has no such split"
    assert without["train_rows"] == "the manifest: 10 fragments"


def test_a_record_with_a_number_that_is_missing_or_unknown_is_no_plan() -> None:
    record = plan_of().as_record()
    with pytest.raises(TypeError, match="num_moons"):
        Plan.from_record({**record, "num_moons": 2})
    del record["threads"]
    with pytest.raises(TypeError, match="threads"):
        Plan.from_record(record)


def test_an_elastic_job_is_planned_for_its_most_workers_and_goes_on_with_its_fewest() -> None:
    plan = plan_of(scale={"min_workers": 2, "max_workers": 5})
    assert (plan.num_workers, plan.min_workers) == (5, 2)
    assert plan.read_task_cpus == 0
    fixed = plan_of(scale={"workers": 2})
    assert (fixed.num_workers, fixed.min_workers) == (2, 2)


def test_on_a_cluster_of_others_too_a_run_takes_no_more_than_its_workers() -> None:
    shared = dataclasses.replace(facts(num_cpus=64), is_shared=True)
    plan = plan_of(shared, scale={"workers": 2})
    # Other runs may have every other CPU: reading waits for none, and threads are those of a worker.
    assert (plan.worker_cpus, plan.read_task_cpus, plan.threads) == (1.0, 0.0, 1)
    assert plan.data_cpus == 62
    full = plan_of(dataclasses.replace(facts(num_cpus=2), is_shared=True), scale={"workers": 2})
    assert (full.worker_cpus, full.data_cpus) == (1.0, 1.0)
    assert plan_of(shared, scale={"workers": 2, "cpus_per_worker": 4.0}).threads == 4


def test_a_strict_job_has_one_number_of_shards_whatever_its_workers_are() -> None:
    plans = [plan_of(loop={"strict": True}, scale={"workers": workers}) for workers in (1, 2, 5)]
    assert [plan.strict_shards for plan in plans] == [12] * 3
    dealt = [shardings(plan, ranks)[TRAIN] for plan in plans for ranks in (1, 2, 5)]
    assert [sharding.num_shards for sharding in dealt] == [12] * 9
    assert [sharding.world_size for sharding in dealt] == [1, 2, 5] * 3
    assert plan_of(loop={"strict": True, "shards": 6}).strict_shards == 6
    assert plan_of().strict_shards == 0


def test_batches_are_dealt_out_to_as_many_ranks_as_are_asked_for() -> None:
    plan = plan_of(loop={"global_batch_rows": 64, "gradient_accumulation_steps": 2}, scale={"min_workers": 1, "max_workers": 4})
    for ranks in (1, 2, 4):
        dealt = shardings(plan, ranks)
        train, validation = dealt[TRAIN], dealt[VALIDATION]
        assert (train.world_size, train.num_shards) == (ranks, 2 * ranks)
        # What an evaluation measures together stays the same, whoever measures it.
        assert (validation.world_size, validation.num_shards) == (ranks, 4)


@given(
    workers=st.integers(1, 6),
    gradient_accumulation_steps=st.integers(1, 4),
    multiple=st.integers(1, 5),
    rows=st.integers(6, 500),
    validation=st.integers(6, 90),
)
def test_the_order_and_how_batches_are_dealt_out_are_those_of_the_plan(
    workers: int, gradient_accumulation_steps: int, multiple: int, rows: int, validation: int
) -> None:
    spec = job(
        loop={
            "global_batch_rows": workers * gradient_accumulation_steps * multiple,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "epochs": 2,
            "seed": 9,
        },
        scale={"workers": workers},
    )
    manifest = manifest_of(train=rows, validation=validation)
    plan = make_plan(spec, manifest, facts())
    order = job_order(spec, plan, manifest)
    assert (order.train.num_rows, order.total_rows, order.steps_per_epoch) == (rows, 2 * rows, plan.steps_per_epoch)
    assert (order.train.seed, order.train.shuffle, order.train.num_windows) == (9, True, plan.train_windows)
    (measured,) = order.evaluations
    assert (measured.split.shuffle, measured.split.num_windows) == (False, plan.validation_windows)
    assert (measured.num_rows, measured.every_steps) == (validation, plan.steps_per_epoch)
    dealt = batch_shardings(plan, order, workers)
    train = dealt[TRAIN]
    assert (train.num_rows, train.batch_rows, train.world_size) == (rows, plan.global_batch_rows, workers)
    for rank in range(workers):
        shards = train.shards(0, rank)
        assert len(shards) == gradient_accumulation_steps
        assume(rows >= plan.global_batch_rows)
        assert [count for _, count in shards] == [multiple] * gradient_accumulation_steps
        assert sum(count for _, count in dealt[VALIDATION].shards(0, rank)) > 0


def test_without_a_validation_split_there_is_no_evaluation() -> None:
    spec, manifest = job(), manifest_of(train=100)
    plan = make_plan(spec, manifest, facts())
    assert (plan.validation_rows, plan.validation_windows) == (0, 0)
    assert job_order(spec, plan, manifest).evaluations == ()


# ---------------------------------------------------------------- refusals


def test_workers_that_do_not_divide_the_batch_are_refused_with_those_that_do() -> None:
    assert refusals(loop={"global_batch_rows": 64, "gradient_accumulation_steps": 2}, scale={"workers": 3}) == [
        (
            "job.yaml scale.workers",
            "3 workers x 2 backward passes with 64 rows per step",
            "a product that divides loop.global_batch_rows",
            "Use 2 or 4 workers, or set loop.global_batch_rows to a multiple of 6.",
        )
    ]
    [(_, _, _, fix)] = refusals(loop={"global_batch_rows": 7, "gradient_accumulation_steps": 2})
    assert fix == "Set loop.global_batch_rows to a multiple of 2."


@pytest.mark.parametrize(("split", "rows"), [("train", {"train": 3}), ("validation", {"train": 1000, "validation": 2})])
def test_more_workers_than_rows_are_refused(split: str, rows: dict[str, int]) -> None:
    count = rows[split]
    assert refusals(manifest=manifest_of(**rows), scale={"workers": 4}) == [
        (
            "job.yaml scale.workers",
            f"4 workers for {count} {split} rows",
            "at least one row per worker",
            f"Use at most {count} workers.",
        )
    ]


def test_a_metric_that_cannot_be_measured_is_refused() -> None:
    [(where, found, _, fix)] = refusals(checkpoint={"metric": "validation/accuracy"})
    assert where == "job.yaml checkpoint.metric"
    assert "no validation split" in found
    assert "validation source" in fix


def test_workers_that_leave_no_cpu_for_reading_are_refused() -> None:
    [(where, found, expected, fix)] = refusals(facts(4), scale={"workers": 2, "cpus_per_worker": 2})
    assert where == "job.yaml scale.cpus_per_worker"
    assert found == "2 workers x 2 CPUs = 4 of 4 CPUs"
    assert "at least 1 CPU left for reading data" in expected
    assert "at most 1.5" in fix
    assert plan_of(facts(4), scale={"workers": 2, "cpus_per_worker": 1.5}).data_cpus == 1


def test_more_workers_than_cpus_can_be_cut_into_are_refused() -> None:
    sections: dict[str, Any] = {"loop": {"global_batch_rows": 200}, "scale": {"workers": 200}}
    [(where, found, _, fix)] = refusals(facts(2), **sections)
    assert (where, fix) == ("job.yaml scale.workers", "Use at most 100 workers.")
    assert found == "200 workers on 2 CPUs, 1 of them kept for reading data"


def test_gpus_that_are_not_there_are_refused() -> None:
    [(where, found, _, fix)] = refusals(facts(num_gpus=1), scale={"workers": 2, "gpus_per_worker": 1})
    assert (where, found) == ("job.yaml scale.gpus_per_worker", "2 workers x 1 GPUs = 2 of 1 GPUs")
    assert "0 to train on CPUs" in fix


def test_a_gpu_is_whole_since_each_rank_needs_its_own() -> None:
    with pytest.raises(ValidationError, match=r"scale\.gpus_per_worker\n.*valid integer"):
        job(scale={"gpus_per_worker": 0.5})
    assert job(scale={"gpus_per_worker": 2}).scale.gpus_per_worker == 2


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ({}, (1, 1, False)),
        ({"workers": 3}, (3, 3, False)),
        ({"min_workers": 2, "max_workers": 5}, (2, 5, True)),
        ({"min_workers": 4, "max_workers": 4}, (4, 4, True)),
    ],
)
def test_a_job_has_a_fewest_and_a_most_of_workers(scale: dict[str, int], expected: tuple[int, int, bool]) -> None:
    found = job(scale=scale).scale
    assert (found.min_num_workers, found.max_num_workers, found.elastic) == expected


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        ({"min_workers": 2}, "go together"),
        ({"max_workers": 2}, "go together"),
        ({"workers": 2, "min_workers": 1, "max_workers": 3}, "not both"),
        ({"min_workers": 3, "max_workers": 2}, "min_workers 3 is more than max_workers 2"),
    ],
)
def test_numbers_of_workers_that_contradict_each_other_are_refused(scale: dict[str, int], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        job(scale=scale)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    found = refusals(
        facts(2),
        manifest_of(train=2),
        loop={"global_batch_rows": 10},
        scale={"workers": 3, "cpus_per_worker": 1, "gpus_per_worker": 1},
        checkpoint={"metric": "validation/loss"},
    )
    fields = [where.removeprefix("job.yaml ") for where, *_ in found]
    assert sorted(fields) == [
        "checkpoint.metric",
        "scale.cpus_per_worker",
        "scale.gpus_per_worker",
        "scale.workers",
        "scale.workers",
    ]
