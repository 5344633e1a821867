"""A job file is read strictly, checked completely, and never run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from raymill.config import strict_yaml
from raymill.config.load import find_job, import_pipeline, import_task, load_job, resolved
from raymill.config.spec import JobSpec
from raymill.errors import InputError, Problem
from raymill.task import Field

PLATFORM = Path(__file__).parents[2] / "platform"

JOB = """\
name: digits
task: jobs.digits.task:Digits
pipeline: pipelines.images:digits
model: {width: 32}
data:
  root: null
optimizer: {kind: AdamW, lr: 1e-3, betas: [0.9, 0.99]}
schedule: {kind: CosineAnnealingLR, warmup_steps: 5}
loop:
  epochs: 3
register: {model: digits}
"""

TASK = """\
import os
from pathlib import Path

from raymill.task import Task

Path(os.environ["MARKER"]).write_text("imported")


class Base(Task):
    def __init__(self, width: int, rate: float = 0.1, schema=None) -> None:
        self.width, self.schema = width, schema


class Digits(Base):
    def build(self): ...

    def evaluate(self, model, batch): ...


class Unfinished(Base):
    def build(self): ...


from subprocess import Popen
"""

PIPELINE = """\
from raymill.task import Pipeline


def digits(root: str | None = None) -> Pipeline:
    return Pipeline(sources={}, schema={})


def wrong(root=None) -> Pipeline:
    return 3
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with one job, as the current folder; importing the job's code leaves the file `marker`."""
    for name, text in {
        "pyproject.toml": "",
        "jobs/digits/job.yaml": JOB,
        "jobs/digits/task.py": TASK,
        "jobs/__init__.py": "",
        "pipelines/__init__.py": "",
        "pipelines/images.py": PIPELINE,
        "extra/task.py": TASK,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    tops = {"jobs", "pipelines", "extra"}
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in tops}
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
        del sys.modules[name]
    sys.modules.update(before)


def problems_of(text: str | bytes, *overrides: str) -> list[Problem]:
    """What loading a job file of this text reports; nothing of the job may have run."""
    file = Path("jobs/digits/job.yaml")
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = set(sys.modules)
    with pytest.raises(InputError) as caught:
        load_job("digits", overrides)
    assert not Path("marker").exists()
    assert not {name for name in set(sys.modules) - before if name.partition(".")[0] in {"jobs", "pipelines", "extra"}}
    return list(caught.value.problems)


def only(text: str | bytes, *overrides: str) -> Problem:
    problems = problems_of(text, *overrides)
    assert len(problems) == 1, problems
    return problems[0]


# ---------------------------------------------------------------- a good job


def test_a_good_job_loads_with_the_line_of_each_value_and_runs_nothing(project: Path) -> None:
    job = load_job("digits")
    assert job.spec.optimizer == JobSpec.model_validate(resolved(job.spec)).optimizer
    assert job.lines["loop.epochs"] == 10
    assert job.lines["optimizer.betas.1"] == 7
    assert job.where("loop.epochs") == "jobs/digits/job.yaml:10 loop.epochs"
    assert job.where("loop.seed") == "jobs/digits/job.yaml:9 loop.seed"
    assert job.where("scale.workers") == "jobs/digits/job.yaml:1 scale.workers"
    assert not (project / "marker").exists()


def test_the_record_is_json_and_reads_back_to_an_equal_spec(project: Path) -> None:
    spec = load_job("digits").spec
    record = resolved(spec)
    assert JobSpec.model_validate(json.loads(json.dumps(record))) == spec
    assert record["register"] == {"model": "digits", "alias": "candidate", "export": "try"}
    several = load_job("digits", ["optimizer={a: {kind: SGD, lr: 1e-2}, b: {kind: Adam}}"]).spec
    assert JobSpec.model_validate(json.loads(json.dumps(resolved(several)))) == several


def test_loading_imports_neither_torch_nor_ray_nor_the_job(project: Path) -> None:
    code = (
        "import sys; from raymill.config.load import load_job; load_job('digits');"
        "print([m for m in ('torch', 'ray', 'mlflow', 'numpy', 'jobs', 'pipelines') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(PLATFORM)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["digits", "jobs/digits", "jobs/digits/job.yaml", "jobs/digits/"])
def test_a_job_is_found_by_name_folder_and_file(project: Path, name: str) -> None:
    assert find_job(name).samefile(project / "jobs/digits/job.yaml")


@pytest.mark.parametrize("name", ["digit", "jobs/digist", "jobs/digts/job.yaml", "x" * 5000, "a\0b", ""])
def test_a_job_that_is_not_there_names_the_nearest(project: Path, name: str) -> None:
    with pytest.raises(InputError, match="digits"):
        find_job(name)


def test_outside_of_a_project_the_way_into_one_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"There are no jobs in {tmp_path}/jobs: go to your project's folder, or make one with"):
        find_job("digits")


# ---------------------------------------------------------------- strict YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("+7", 7),
        ("0x1F", 31),
        ("0o17", 15),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("1.2.3", "1.2.3"),
        ("|\n  1\n", "1\n"),
    ],
)
def test_what_a_plain_word_means(text: str, value: object) -> None:
    document = strict_yaml.parse(f"a: {text}".encode())
    assert document.problems == ()
    assert document.value == {"a": value}
    assert type(document.value["a"]) is type(value)


@pytest.mark.parametrize(
    ("old", "new", "line", "found"),
    [
        ("  epochs: 3", "  epochs: 3\n  epochs: 4", 10, "the key 'epochs' twice, on lines 10 and 11"),
        ("epochs: 3", "epochs: 010", 10, "010, with a leading zero"),
        ("epochs: 3", "epochs: !!int 3", 10, "the tag tag:yaml.org,2002:int"),
        ("lr: 1e-3", "lr: .inf", 7, ".inf"),
        ("lr: 1e-3", "lr: 1e999", 7, "1e999"),
        ("epochs: 3", "epochs: 99999999999999999999", 10, "99999999999999999999"),
        ("root: null", "root: &a null", 6, "the anchor &a"),
        ("root: null", "root: *a", 6, "the alias *a"),
        ("  root: null", "  1: x", 6, "the key 1"),
        ("  root: null", "\troot: null", 6, "found character '\\t' that cannot start any token (column 1)"),
        ("{width: 32}", "{width: 32", 5, None),
        ("{width: 32}", "{width: \x07}", 4, "the character '\\x07'"),
        ("{model: digits}", "{model: digits}\n---\nname: other", 12, "a second document (column 1)"),
        ("name: digits", "%YAML 1.1\n---\nname: digits", 1, "a directive (%YAML or %TAG) (column 1)"),
    ],
)
def test_each_thing_that_is_not_strict_is_refused_with_its_line(
    project: Path, old: str, new: str, line: int, found: str | None
) -> None:
    assert old in JOB
    problems = problems_of(JOB.replace(old, new, 1))
    assert problems[0].where.startswith(f"jobs/digits/job.yaml:{line}")
    assert found in (None, problems[0].found)
    assert len(problems) == (2 if new == "  1: x" else 1), "the key 1 is also an unknown argument, nothing else follows"


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        (b"\xef\xbb\xbfname: a", 1, "a byte order mark"),
        (b"name: a\nx: \xff", 2, "the byte 0xff"),
        (b"# " + b"x" * strict_yaml.MAX_BYTES, 1, f"more than {strict_yaml.MAX_BYTES} bytes"),
        (b"", 1, "None"),
        (b"- 1\n- 2", 1, "[1, 2]"),
        (b"text", 1, "'text'"),
    ],
)
def test_a_file_that_is_no_mapping_in_utf8_is_refused(project: Path, content: bytes, line: int, found: str) -> None:
    problem = only(content)
    place = f"jobs/digits/job.yaml:{line}" if content else "jobs/digits/job.yaml"
    assert (problem.where, problem.found) == (place, found)


def test_tags_never_construct_anything(project: Path) -> None:
    attack = f"!!python/object/apply:os.system ['touch {project}/touched']"
    problem = only(JOB.replace("root: null", f"root: {attack}"))
    assert problem.found == "the tag tag:yaml.org,2002:python/object/apply:os.system"
    assert not (project / "touched").exists()


def test_bombs_are_refused_before_they_grow() -> None:
    aliases = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 100))
    nested = "a: " + "[" * 60_000
    deep_keys = "{? " * 20_000
    started = time.perf_counter()
    for bomb in (aliases, nested, deep_keys):
        document = strict_yaml.parse(bomb.encode())
        assert document.problems
    assert time.perf_counter() - started < 10


# ---------------------------------------------------------------- the spec's own rules


@pytest.mark.parametrize(
    ("old", "new", "where", "words"),
    [
        ("epochs: 3", "epochs: '3'", "10 loop.epochs", "found '3'; expected a valid integer"),
        ("epochs: 3", "epochs: 0", "10 loop.epochs", "greater than 0"),
        ("epochs: 3", "epoch: 3", "10 loop.epoch", "Did you mean 'epochs'?"),
        ("loop:", "lop:", "9 lop", "Did you mean 'loop'?"),
        ("name: digits", "name: a b", "1 name", "1 to 100 letters"),
        ("name: digits", "", "2 name", "found nothing; expected a value (also the name"),
        ("{model: digits}", "{modle: digits}", "11 register.modle", "Did you mean 'model'?"),
        ("{kind: CosineAnnealingLR, warmup_steps: 5}", "{warmup_steps: -5}", "8 schedule.warmup_steps", "equal to 0"),
        ("{kind: AdamW, lr: 1e-3, betas: [0.9, 0.99]}", "7", "7 optimizer", "mapping of fields"),
        ("lr: 1e-3", "max_grad_norm: -1", "7 optimizer.max_grad_norm", "greater than 0"),
    ],
)
def test_types_ranges_and_unknown_fields_are_reported_at_their_line(
    project: Path, old: str, new: str, where: str, words: str
) -> None:
    problems = [str(problem) for problem in problems_of(JOB.replace(old, new, 1))]
    matching = [problem for problem in problems if problem.startswith(f"jobs/digits/job.yaml:{where}: ")]
    assert len(matching) == 1, problems
    assert words in matching[0]


# ---------------------------------------------------------------- code that a job names


@pytest.mark.parametrize(
    "path",
    [
        "os:system",
        "builtins:eval",
        "subprocess:Popen",
        "jobs.digits.task:__class__",
        "jobs.digits.task:Digits.__init__",
        "jobs._private:Digits",
        "jobs..task:Digits",
        "jobs.digits.task",
        "jobs.digits.task:Digits\n",
        "jobs.d\u0456gits.task:Digits",
        "j\u043ebs.digits.task:Digits",
        "../jobs/digits/task:Digits",
        "extra.task:Digits",
        "jobs.digits.task:Popen",
        "jobs.digits.task:os",
    ],
)
@pytest.mark.parametrize("field", ["task", "pipeline"])
def test_code_outside_the_allowed_packages_is_refused_unseen(project: Path, path: str, field: str) -> None:
    problem = only(JOB, f"{field}={json.dumps(path)}")
    assert problem.where == f"--set {field}"


@pytest.mark.parametrize(
    ("old", "new", "where", "fix"),
    [
        ("jobs.digits.task:", "jobs.digits.tsk:", "2 task", "Did you mean 'jobs.digits.task'?"),
        ("jobs.digits.task:", "jobs.digts.task:", "2 task", "Did you mean 'jobs.digits'?"),
        (":Digits", ":Digit", "2 task", "Did you mean 'Digits'?"),
        (":digits", ":digit", "3 pipeline", "Did you mean 'digits'?"),
        ("width: 32", "width: 32, witdh: 1", "4 model.witdh", "Did you mean 'width'?"),
        ("width: 32", "width: wide", "4 model.width", "Change width to a value of type int."),
        ("width: 32", "", "4 model.width", "Add width; it has no default."),
        ("width: 32", "width: 3, schema: {}", "4 model.schema", "Valid names: rate, width."),
        ("root: null", "rot: null", "6 data.rot", "Did you mean 'root'?"),
        ("root: null", "root: 3", "6 data.root", "Change root to a value of type str | None."),
        ("AdamW", "AdmW", "7 optimizer.kind", "Did you mean 'AdamW'?"),
        ("AdamW", "Optimizer", "7 optimizer.kind", None),
        ("AdamW", "swa_utils", "7 optimizer.kind", None),
        ("AdamW", "LBFGS", "7 optimizer.kind", None),
        ("lr: 1e-3", "lr: fast", "7 optimizer.lr", "Change lr to a value of type float | Tensor."),
        ("lr: 1e-3", "params: []", "7 optimizer.params", None),
        ("[0.9, 0.99]", "[0.9]", "7 optimizer.betas", None),
        ("CosineAnnealingLR", "CosineAnealingLR", "8 schedule.kind", "Did you mean 'CosineAnnealingLR'?"),
        ("CosineAnnealingLR", "LRScheduler", "8 schedule.kind", None),
        ("CosineAnnealingLR", "ReduceLROnPlateau", "8 schedule", None),
        ("CosineAnnealingLR", "CosineAnnealingLR, metric: validation/loss", "8 schedule", None),
        (
            "CosineAnnealingLR",
            "ReduceLROnPlateau, metric: validation/loss, patiense: 3",
            "8 schedule.patiense",
            "Did you mean 'patience'?",
        ),
        ("AdamW", "AdamW, schedule: {kind: StepLR}", "7 optimizer.schedule.step_size", "Add step_size; it has no default."),
        ("AdamW", "AdamW, schedule: [{kind: StepLR, step_size: 1, steps: none}]", "7 optimizer.schedule.0.steps", None),
        ("CosineAnnealingLR", "Counter", "8 schedule.kind", None),
        ("CosineAnnealingLR", "StepLR", "8 schedule.step_size", "Add step_size; it has no default."),
        ("CosineAnnealingLR", "StepLR, step_size: 2, last_epoch: 1", "8 schedule.last_epoch", None),
    ],
)
def test_names_and_arguments_are_checked_without_running_anything(
    project: Path, old: str, new: str, where: str, fix: str | None
) -> None:
    assert old in JOB
    problem = only(JOB.replace(old, new, 1))
    assert problem.where == f"jobs/digits/job.yaml:{where}"
    assert fix in (None, problem.fix)


def test_every_torch_optimizer_and_schedule_is_known_by_its_source(project: Path) -> None:
    import torch

    def named(module: object, base: type) -> set[str]:
        return {name for name, item in vars(module).items() if isinstance(item, type) and issubclass(item, base)}

    schedules = named(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    optimizers = named(torch.optim, torch.optim.Optimizer) - {"Optimizer", "LBFGS"}
    refused = {"LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"}
    assert len(optimizers) > 10
    for name in optimizers:
        load_job("digits", [f"optimizer={{kind: {name}}}"])
    for name in {name for name in schedules if not name.startswith("_")} - refused - {"LRScheduler"}:
        try:
            metric = ", metric: validation/loss" if name == "ReduceLROnPlateau" else ""
            load_job("digits", [f"schedule={{kind: {name}{metric}}}"])
        except InputError as error:
            assert {problem.found for problem in error.problems} == {"nothing"}  # noqa: PT017
    assert all(problems_of(JOB, f"schedule={{kind: {name}}}") for name in refused)


def test_a_derived_argument_may_be_left_out_or_given(project: Path) -> None:
    load_job("digits", ["schedule.T_max=100"])
    load_job("digits", ["schedule={kind: OneCycleLR, max_lr: 0.1}"])
    load_job("digits", ["schedule=[{kind: ConstantLR, steps: 5}, {kind: CosineAnnealingLR}]"])
    assert only(JOB, "schedule=[{kind: ConstantLR, stepps: 5}]").where == "--set schedule.0.stepps"


def test_each_of_several_optimizers_is_checked(project: Path) -> None:
    problem = only(JOB, "optimizer={a: {kind: SGD}, b: {kind: SGD, momentun: 1}}")
    assert (problem.where, problem.fix) == ("--set optimizer.b.momentun", "Did you mean 'momentum'?")


def test_each_of_a_list_of_optimizers_is_checked_alone_or_below_an_objective(project: Path) -> None:
    problem = only(JOB, "optimizer=[{kind: SGD, parameters: [a.*]}, {kind: SGD, momentun: 1}]")
    assert (problem.where, problem.fix) == ("--set optimizer.1.momentun", "Did you mean 'momentum'?")
    problem = only(JOB, "optimizer={a: [{kind: SGD}, {kind: SGD, from_step: -1}], b: {kind: SGD}}")
    assert problem.where == "--set optimizer.a.1.from_step"
    with pytest.raises(InputError):
        load_job("digits", ["optimizer=[]"])


OWN_CLASSES = """
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

class Lion(Optimizer):
    def __init__(self, params, lr: float = 0.1, betas: tuple[float, float] = (0.9, 0.99)) -> None: ...

class Sign(torch.optim.Optimizer):
    def __init__(self, params, lr: float) -> None: ...

class Steps(LRScheduler):
    def __init__(self, optimizer, factor: float, last_epoch: int = -1) -> None: ...

class Other:
    pass
"""


def test_own_optimizer_and_schedule_classes_are_checked_by_their_source(project: Path) -> None:
    (project / "jobs/digits/optim.py").write_text(OWN_CLASSES)
    own = "jobs.digits.optim"
    load_job(
        "digits",
        [f"optimizer={{kind: '{own}:Lion', lr: 1e-3, max_grad_norm: 1.0}}", f"schedule={{kind: '{own}:Steps', factor: 0.5}}"],
    )
    assert only(JOB, f"optimizer={{kind: '{own}:Lion', beta: 1}}").where == "--set optimizer.beta"
    assert only(JOB, f"optimizer={{kind: '{own}:Sign'}}").where == "--set optimizer.lr"
    assert only(JOB, f"optimizer={{kind: '{own}:Lion', params: []}}").where == "--set optimizer.params"
    assert "torch.optim.Optimizer" in only(JOB, f"optimizer={{kind: '{own}:Other'}}").expected
    assert "torch.optim.Optimizer" in only(JOB, f"optimizer={{kind: '{own}:Steps', factor: 0.5}}").expected
    assert only(JOB, "optimizer={kind: 'os:system', lr: 1e-3}").where == "--set optimizer.kind"
    assert only(JOB, f"schedule={{kind: '{own}:Steps'}}").where == "--set schedule.factor"


def test_a_module_that_is_not_python_is_reported(project: Path) -> None:
    (project / "jobs/digits/task.py").write_text("class Digits(:")
    assert "not Python" in only(JOB).found


def test_a_module_whose_name_is_longer_than_a_files_can_be_is_not_there(project: Path) -> None:
    assert only(JOB, f"task=jobs.{'x' * 300}.task:Digits").where == "--set task"
    assert only(JOB, f"task=jobs.digits.{'x' * 300}:Digits").where == "--set task"


def test_the_projects_pyproject_and_nothing_else_widens_the_packages(project: Path) -> None:
    (project / "pyproject.toml").write_text('[tool.raymill]\npackages = ["extra"]\n')
    assert load_job("digits", ["task=extra.task:Digits"]).spec.task == "extra.task:Digits"
    for wrong in ('[tool.raymill]\npackages = "extra"', "[tool.raymill]\npackages = ['a.b']", "x ="):
        (project / "pyproject.toml").write_text(wrong)
        with pytest.raises(InputError, match=r"pyproject\.toml"):
            load_job("digits")


# ---------------------------------------------------------------- all at once


def test_a_file_with_many_mistakes_reports_each_at_its_line(project: Path) -> None:
    text = (
        JOB.replace(":Digits", ":Digit")
        .replace("root: null", "rot: null")
        .replace("AdamW, lr: 1e-3", "AdamW, lr: fast, max_grad_norm: 0")
        .replace("  epochs: 3", "  epochs: 0\n  epochs: 1\n  sead: 1")
        .replace("{model: digits}", "{alias: !!str a}")
    )
    places = [problem.where.partition(":")[2] for problem in problems_of(text, "scale.workers=two", "oops")]
    assert places == [
        "2 task",
        "6 data.rot",
        "7 optimizer.max_grad_norm",
        "7 optimizer.lr",
        "10 loop.epochs",
        "10 loop.epochs",
        "12 loop.sead",
        "13 register.alias",
        "13 register.model",
        "",
        "",
    ]


# ---------------------------------------------------------------- overrides


def test_overrides_change_add_and_clear_values(project: Path) -> None:
    job = load_job("digits", ["loop.epochs=1", "scale.workers=4", "register=null", "optimizer.betas.0=0.5", "loop.epochs=2"])
    assert (job.spec.loop.epochs, job.spec.scale.workers, job.spec.register_) == (2, 4, None)
    assert job.spec.model_dump()["optimizer"]["betas"] == [0.5, 0.99]
    assert job.where("loop.epochs") == "--set loop.epochs"
    assert job.where("register.model") == "--set register.model"
    assert job.where("loop.seed") == "jobs/digits/job.yaml:9 loop.seed"
    assert not {name for name in job.lines if name.startswith(("loop.epochs", "register"))}


def test_an_override_makes_the_mapping_it_needs_and_replaces_what_was_wrong(project: Path) -> None:
    file = project / "jobs/digits/job.yaml"
    file.write_text(JOB.replace("schedule: {kind: CosineAnnealingLR, warmup_steps: 5}", "schedule: null"))
    schedule = load_job("digits", ["schedule.kind=StepLR", "schedule.step_size=2"]).spec.schedule
    assert schedule is not None
    file.write_text(JOB.replace("epochs: 3", "epochs: 010"))
    assert load_job("digits", ["loop.epochs=10"]).spec.loop.epochs == 10


@pytest.mark.parametrize(
    ("override", "where", "words"),
    [
        ("a.b", "--set a.b", "a field path, '=', a value"),
        ("=1", "--set =1", "a field path"),
        ("loop..epochs=1", "--set loop..epochs=1", "a field path"),
        ("loop.epochz=1", "--set loop.epochz", "Did you mean 'epochs'?"),
        ("lop.epochs=1", "jobs/digits/job.yaml:1 lop", "Did you mean 'loop'?"),
        ("loop.epochs=many", "--set loop.epochs", "a valid integer"),
        ("loop.epochs=010", "--set loop.epochs", "leading zero"),
        ("loop.epochs=[1", "--set loop.epochs", "strict YAML"),
        ("name.x=1", "--set name.x", "Set name itself."),
        ("optimizer.betas.7=1", "--set optimizer.betas.7", "a number below 2"),
        ("optimizer.betas=[0.9, x]", "--set optimizer.betas", "tuple[float"),
        ("task=!!python/name:os.system ''", "--set task", "the tag"),
    ],
)
def test_wrong_overrides_are_reported_as_typed(project: Path, override: str, where: str, words: str) -> None:
    problem = only(JOB, override)
    assert problem.where == where
    assert words in str(problem)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("lr=1e-2", "'optimizer.lr'"),
        ("momentum=0.9", "'optimizer.momentum'"),
        ("loop.lr=1e-2", "'optimizer.lr'"),
        ("width=3", "'model.width'"),
        ("optimizer.Epochs=3", "'loop.epochs'"),
        ("model.seed=3", "'loop.seed'"),
        ("loop.schedule=null", "'schedule' or 'optimizer.schedule'"),
        ("loop.LR=1e-2", "'optimizer.lr'"),
        ("metric=validation/loss", "'schedule.metric' or 'checkpoint.metric'"),
        ("loop.Epochs=3", "'epochs'"),
    ],
)
def test_a_field_in_a_wrong_place_leads_to_its_full_path(project: Path, override: str, meant: str) -> None:
    job = JOB.replace("{kind: AdamW, lr: 1e-3, betas: [0.9, 0.99]}", "{kind: SGD}")
    assert only(job, override).fix == f"Did you mean {meant}?"


@pytest.mark.parametrize(
    ("old", "new", "bare"),
    [("lr: 1e-3", "lr: '1e-3'", "1e-3"), ("epochs: 3", "epochs: '3'", "3"), ("width: 32", 'width: "32"', "32")],
)
def test_a_number_in_quotes_is_to_lose_them(project: Path, old: str, new: str, bare: str) -> None:
    assert only(JOB.replace(old, new)).fix == f"Write {bare} without quotes."


def test_quotes_are_not_blamed_for_what_would_be_wrong_without_them(project: Path) -> None:
    assert only(JOB.replace("lr: 1e-3", "lr: 'fast'")).fix.startswith("Change lr")
    assert only(JOB.replace("epochs: 3", "epochs: '1.5'")).fix == "Change loop.epochs."


@pytest.mark.parametrize(
    ("old", "new", "meant"),
    [
        ("optimizer:", "optimiser:", "optimizer"),
        ("{model: digits}", "{modle: digits}", "model"),
        ("pipeline:", "pipelines:", "pipeline"),
        ("root: null", "rot: null", "root"),
    ],
)
def test_a_misspelled_name_is_one_problem_and_not_a_missing_one_too(project: Path, old: str, new: str, meant: str) -> None:
    assert only(JOB.replace(old, new, 1)).fix == f"Did you mean {meant!r}?"


# ---------------------------------------------------------------- the job's own code


def test_import_makes_the_pipeline_and_the_task(project: Path) -> None:
    spec = load_job("digits").spec
    schema = {"label": Field(np.dtype("int64").name, classes=10)}
    assert import_pipeline(spec).schema == {}
    task = import_task(spec, schema)
    assert vars(task) == {"width": 32, "schema": schema}
    assert (project / "marker").exists()


def test_import_refuses_what_is_not_a_pipeline_or_a_task(project: Path) -> None:
    with pytest.raises(InputError, match="returned 3"):
        import_pipeline(load_job("digits", ["pipeline=pipelines.images:wrong"]).spec)
    with pytest.raises(InputError, match="without evaluate"):
        import_task(load_job("digits", ["task=jobs.digits.task:Unfinished"]).spec, {})


def test_import_checks_a_spec_that_did_not_come_through_load(project: Path) -> None:
    spec = load_job("digits").spec.model_copy(update={"pipeline": "os:system", "data": {"command": "touch touched"}})
    with pytest.raises(InputError, match="the package 'os'"):
        import_pipeline(spec)
    assert not (project / "touched").exists()


def test_import_names_a_missing_library_and_a_module_from_another_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_job("digits").spec
    import_pipeline(spec)
    other = project / "other"
    for name, text in {
        "pyproject.toml": "",
        "jobs/a": "",
        "pipelines/__init__.py": "",
        "pipelines/images.py": PIPELINE,
    }.items():
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text(text)
    monkeypatch.chdir(other)
    with pytest.raises(InputError, match="already imported from"):
        import_pipeline(spec)
    (other / "pipelines/broken.py").write_text(
        "import no_such_library\nfrom raymill.task import Pipeline\ndef make() -> Pipeline: ..."
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "pipelines"]:
        del sys.modules[name]
    with pytest.raises(InputError, match="no_such_library"):
        import_pipeline(spec.model_copy(update={"pipeline": "pipelines.broken:make"}))


def test_a_literal_secret_in_a_job_is_refused_and_not_repeated(project: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_job("digits", ["data.api_key=canary-1", "model.store=s3://me:canary-2@host/x"])
    found = [problem for problem in caught.value.problems if problem.found == "a literal secret"]
    assert sorted(problem.where.split()[-1] for problem in found) == ["data.api_key", "model.store"]
    assert "canary" not in " ".join(problem.found + problem.fix for problem in found)
