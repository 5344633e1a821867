"""What a job's own code may do through the seams, each with the promise unbroken: after a stop and a crash the weights of the
undisturbed run, to the bit, at one, two and three workers; and under `strict` the same weights at any number of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from probes import critic, gan, layers, masked, mixed, transfer
from raymill.checkpoint import directory
from raymill.checkpoint.snapshot import Tensors, load
from raymill.errors import InputError
from worker_harness import Experiment, NewRun, TrainingRun, stopped_and_killed, strict_at_other_numbers

PROBES: Mapping[str, Experiment] = {
    "critic, hooks and an average": Experiment(critic.Wasserstein, gan.pipeline, critic.VALUES),
    "a trunk unfrozen, three optimizers": Experiment(transfer.Transfer, mixed.pipeline, transfer.VALUES),
    "layers of all kinds": Experiment(layers.Layers, mixed.pipeline, layers.VALUES),
    "masks drawn in collate": Experiment(masked.FillIn, masked.pipeline, masked.VALUES),
}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("probe", PROBES)
def test_stopped_and_killed_it_ends_with_the_same_weights(new_run: NewRun, probe: str, world_size: int) -> None:
    stopped_and_killed(new_run, PROBES[probe], world_size)


@pytest.mark.parametrize("probe", PROBES)
def test_strict_it_ends_with_the_same_weights_at_any_number_of_workers(new_run: NewRun, probe: str) -> None:
    strict_at_other_numbers(new_run, PROBES[probe])


# ---------------------------------------------------------------- layers and their state

LAYERS = PROBES["layers of all kinds"]


def weights(run: TrainingRun) -> Tensors:
    name = directory.find_latest(run.folder / "checkpoints", print)
    assert name is not None
    return load(run.folder / "checkpoints" / name).weights


def bits(tensors: Tensors, *prefixes: str) -> dict[str, list[int]]:
    return {name: tensor.reshape(-1).view(torch.uint8).tolist() for name, tensor in tensors.items() if name.startswith(prefixes)}


@pytest.mark.parametrize(("world_size", "strict"), [(1, False), (2, False), (1, True), (3, True)])
def test_constants_and_the_statistics_of_a_trunk_in_eval_mode_stay(new_run: NewRun, world_size: int, strict: bool) -> None:
    run = new_run(LAYERS.with_values(loop={"strict": strict, "gradient_accumulation_steps": 1}))
    run.go(world_size)
    kept = ("constants.", "trunk.1.running", "trunk.1.num_batches")
    found = weights(run)
    assert bits(found, *kept) == bits(layers.Layered().state_dict(), *kept)
    assert (found["norm.running_mean"] != 0).all(), "other statistics go on"
    assert found["countdown"] < 1000
    assert found["rotation"].abs().min() > 0


def test_layers_that_a_loss_leaves_out_are_trained_alike_at_one_worker_and_at_two(new_run: NewRun) -> None:
    frozen = LAYERS.with_values(loop={"epochs": 1})
    alone, two = new_run(frozen), new_run(frozen.with_values(loop={"gradient_accumulation_steps": 1}))
    steps = alone.go(1).metrics("step"), two.go(2).metrics("step")
    assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-4)
    for unused in ("unused.weight", "unused.bias"):
        torch.testing.assert_close(weights(alone)[unused], weights(two)[unused])


def test_state_on_the_task_is_named_once(new_run: NewRun) -> None:
    counting = Experiment(layers.Counting, mixed.pipeline, layers.VALUES).with_values(loop={"epochs": 1})
    changed = [event for event in new_run(counting).go(2).events if event["kind"] == "task_changed"]
    assert [(event["step"], event["attributes"]) for event in changed] == [(2, ["num_losses"])]
    assert [event for event in new_run(LAYERS).go(2).events if event["kind"] == "task_changed"] == []


# ---------------------------------------------------------------- a save before an evaluation


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_run_that_ends_in_an_evaluation_begins_with_it_and_decides_the_same(new_run: NewRun, world_size: int) -> None:
    plain = Experiment(mixed.Mixed, mixed.pipeline, mixed.VALUES).with_values(loop={"epochs": 2})
    expected = new_run(plain).go(world_size)
    run = new_run(plain.with_values(loop={"epochs": 2}))
    stopped = run.go(world_size, stop_after=mixed.STEPS_PER_EPOCH)
    assert (stopped.first.status, stopped.first.step) == ("interrupted", mixed.STEPS_PER_EPOCH)
    assert stopped.metrics("evaluation") == []
    again = run.go(world_size, stop_after=2 * mixed.STEPS_PER_EPOCH)
    assert again.first.status == "interrupted", "all rows are trained on, not all is evaluated"
    last = run.go(world_size)
    assert [event for event in last.events if event["kind"] == "step"] == []
    assert [*again.metrics("evaluation"), *last.metrics("evaluation")] == expected.metrics("evaluation")
    assert last.sha256 == expected.sha256
    best = [event["step"] for event in [*again.events, *last.events] if event["kind"] == "checkpoint" and event["best"]]
    assert best == [event["step"] for event in expected.events if event["kind"] == "checkpoint" and event["best"]]
    signs = [event for event in expected.events if event["kind"] == "evaluation_batch"]
    assert [(event["epoch"], event["batch"], event["num_batches"]) for event in signs] == [
        (0, 0, 2),
        (0, 1, 2),
        (1, 0, 2),
        (1, 1, 2),
    ]


# ---------------------------------------------------------------- time


def test_an_objective_is_minimised_in_the_steps_that_it_is_due_in(new_run: NewRun) -> None:
    run = new_run(PROBES["critic, hooks and an average"])
    attempt = run.go(2)
    steps = [event for event in attempt.events if event["kind"] == "step"]
    assert [event["step"] for event in steps if "train/generator_loss" in event["metrics"]] == [5, 10]
    assert all("train/critic_loss" in event["metrics"] for event in steps)
    found = weights(run)
    assert (found["num_steps"], found["num_epochs"]) == (len(steps), 2)


@pytest.mark.parametrize(("kind", "world_size"), [("ema", 1), ("swa", 2)])
def test_an_average_is_of_the_weights_behind_each_step_and_is_what_is_evaluated(
    new_run: NewRun, kind: str, world_size: int
) -> None:
    plain = Experiment(mixed.Mixed, mixed.pipeline, mixed.VALUES).with_values(
        loop={"epochs": 1}, checkpoint={"every_steps": 1, "keep": 9}
    )
    behind = new_run(plain)
    behind.go(world_size)
    folder = behind.folder / "checkpoints"
    states = [load(folder / name).weights for name in directory.names(folder)]
    average = {"kind": kind, "from_step": 3} | ({"decay": 0.75} if kind == "ema" else {})
    run = new_run(plain.with_values(loop={"epochs": 1, "average": average}))
    attempt = run.go(world_size)
    found = weights(run)
    task = mixed.Mixed(mixed.SCHEMA)
    model = task.build()
    for name, _ in model.named_parameters():
        third, fourth, fifth = (state[name] for state in states[2:5])
        expected = (third + fourth + fifth) / 3 if kind == "swa" else 0.75 * (0.75 * third + 0.25 * fourth) + 0.25 * fifth
        torch.testing.assert_close(found[name], expected)
    model.load_state_dict(found)
    batch = {name: torch.from_numpy(column) for name, column in mixed.make_rows(mixed.VALIDATION_ROWS, 2).items()}
    with torch.no_grad():
        loss = task.evaluate(model.eval(), batch)["loss"]
    assert isinstance(loss, torch.Tensor)
    assert attempt.first.metrics["validation/loss"] == pytest.approx(float(loss.mean()), rel=1e-5)


# ---------------------------------------------------------------- optimizers by parameters


def test_a_trunk_stays_until_its_first_step_and_norms_are_not_decayed(new_run: NewRun) -> None:
    experiment = PROBES["a trunk unfrozen, three optimizers"]
    run = new_run(experiment.with_values(checkpoint={"every_steps": 1, "keep": 20}))
    attempt = run.go(1)
    folder = run.folder / "checkpoints"
    states = {int(name[5:13]): load(folder / name).weights for name in directory.names(folder)}
    assert torch.equal(states[1]["trunk.weight"], states[transfer.UNFROZEN_FROM - 1]["trunk.weight"])
    assert not torch.equal(states[transfer.UNFROZEN_FROM - 1]["trunk.weight"], states[transfer.UNFROZEN_FROM]["trunk.weight"])
    assert not torch.equal(states[1]["head.weight"], states[2]["head.weight"])
    rates = ["train/learning_rate", "train/learning_rate_2", "train/learning_rate_3"]
    assert set(rates) <= set(attempt.metrics("step")[0])


def test_patterns_that_fit_nothing_and_parameters_that_none_fits_are_refused_together(new_run: NewRun) -> None:
    optimizer = [{"kind": "SGD", "lr": 0.1, "parameters": ["trunc.*"]}, {"kind": "SGD", "lr": 0.1, "parameters": ["head.*"]}]
    experiment = Experiment(transfer.Transfer, mixed.pipeline, {**transfer.VALUES, "optimizer": optimizer})
    with pytest.raises(InputError) as caught:
        new_run(experiment).go(1)
    first, second = caught.value.problems
    assert first.where == "optimizer.0.parameters"
    assert "trunc" in first.found
    assert "trunk.weight" in second.found
