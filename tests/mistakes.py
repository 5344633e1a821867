"""Jobs with one mistake each, as a user makes them, and what must be said of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

JOB = """\
name: tiny
task: tiny.code:Net
pipeline: tiny.code:rows
optimizer: {kind: SGD, lr: 0.1, momentum: 0.9}
loop: {epochs: 2, global_batch_rows: 16, threads: 1}
scale: {workers: 2}
checkpoint: {metric: validation/accuracy}
register: {model: tiny}
"""

CODE = '''\
"""A job that is right, until something in it is changed."""

from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raymill.data.sources import ArraySource
from raymill.task import Field, Kept, Objective, Picture, Pipeline, Task, Total

SCHEMA = {"x": Field("float32", (2,)), "label": Field("int64", classes=3)}
CALLS = {"loss": 0}


def make_rows(count, seed):
    x = np.random.default_rng(seed).normal(size=(count, 2)).astype(np.float32)
    return {"x": x, "label": np.arange(count, dtype=np.int64) % 3}


def check(rows):
    return {}


def change(rows, split, generator):
    return rows


def collate(rows):
    return {"x": torch.tensor(rows["x"]), "label": torch.tensor(rows["label"])}


def rows() -> Pipeline:
    sources = {split: ArraySource(f"tiny/{split}", partial(make_rows, count, 1), 12) for split, count in SIZES.items()}
    return Pipeline(sources=sources, schema=SCHEMA, transform=change, collate=collate, check=check)


SIZES = {"train": 50, "validation": 10}


class Net(Task):
    def __init__(self):
        self.num_features = 2

    def build(self):
        return nn.Sequential(nn.Linear(self.num_features, 4), nn.ReLU(), nn.Linear(4, 3))

    def loss(self, model, batch):
        CALLS["loss"] += 1
        scores = model(batch["x"])
        return functional.cross_entropy(scores, batch["label"])

    def evaluate(self, model, batch):
        scores = model(batch["x"])
        return {"accuracy": (scores.argmax(dim=1) == batch["label"]).float(), "rows": Total(torch.tensor(len(scores)))}

    def inputs(self, batch):
        return (batch["x"],)
'''

LOSS = '        return functional.cross_entropy(scores, batch["label"])\n'
BUILD = "        return nn.Sequential(nn.Linear(self.num_features, 4), nn.ReLU(), nn.Linear(4, 3))\n"
MEASURED = (
    '        return {"accuracy": (scores.argmax(dim=1) == batch["label"]).float(), "rows": Total(torch.tensor(len(scores)))}\n'
)
NOTES_IN_STATE = (
    "        class Noted(nn.Sequential):\n            def get_extra_state(self):\n                return {'seen': 1}\n\n"
)
LONG = "def long(rows):\n    return np.zeros(11, int)\n\n\n"
CHANGE = "    return rows\n\n\ndef collate"
INPUTS = "    def inputs(self, batch):\n"
CONCLUDE = "    def conclude(self, kept, totals):\n"
COLLATE = '    return {"x": torch.tensor(rows["x"]), "label": torch.tensor(rows["label"])}\n'


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A mistake.

    Attributes:
        name: what was done wrong.
        edits: (old, new) in `CODE`.
        line: the line of code that must be shown; "" where it is a field of the job.
        found: what must be said of what was found.
        fix: what must be said of what to do.
        job: (old, new) in `JOB`.
        field: the field that must be named, where it is one of the job.
        files: further files, by their path from the project's root.
        file: the file that the line is in.
    """

    name: str
    edits: Sequence[tuple[str, str]] = ()
    line: str = ""
    found: str = ""
    fix: str = ""
    job: Sequence[tuple[str, str]] = ()
    field: str = ""
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    file: str = "tiny/code.py"

    def write(self, root: Path) -> None:
        """Make the project with its mistake."""
        texts = {"tiny/code.py": CODE, "jobs/tiny/job.yaml": JOB, "pyproject.toml": '[tool.raymill]\npackages = ["tiny"]\n'}
        for name, edits in (("tiny/code.py", self.edits), ("jobs/tiny/job.yaml", self.job)):
            for old, new in edits:
                assert texts[name].count(old) == 1, (name, old)
                texts[name] = texts[name].replace(old, new)
        for name, text in {**texts, **self.files}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)

    def place(self, root: Path) -> str:
        """Where it is, as it must be said."""
        (number, *_) = [at for at, text in enumerate((root / self.file).read_text().splitlines(), 1) if text.strip() == self.line]
        return f"{self.file}:{number}"


def _loss(name: str, line: str, found: str, fix: str = "Correct the loss", shown: str = "") -> Mistake:
    """A mistake in the last line of the loss; `shown` is another line that must be shown."""
    return Mistake(name, [(LOSS, f"        {line}\n")], shown or line, found, fix)


DEF_LOSS, DEF_BUILD, DEF_EVALUATE = "def loss(self, model, batch):", "def build(self):", "def evaluate(self, model, batch):"
BRANCHING = """\
class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        if x.sum().item() > 0:
            x = -x
        return self.layer(x)


"""
DEF_CHANGE, DEF_INPUTS = "def change(rows, split, generator):", "def inputs(self, batch):"
BATCH_NORM = "return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))"


TWO_OBJECTIVES = """\
    def objectives(self):
        return [Objective("loss", self.loss), Objective("other", self.other)]

    def other(self, model, batch):
        return model(batch["x"]).square().mean()

"""


def _objective(name: str, arguments: str, shown: str, found: str, fix: str, body: str = LOSS) -> Mistake:
    """A mistake in the arguments of the one objective."""
    given = f"    def objectives(self):\n        return [Objective('loss', self.loss, {arguments})]\n\n    {DEF_LOSS}"
    return Mistake(name, [(f"    {DEF_LOSS}", given), (LOSS, body)], shown, found, fix)


def _behind(name: str, hook: str, line: str, found: str, fix: str, shown: str = "") -> Mistake:
    """A mistake in what the task does behind a step or an epoch."""
    given = f"    def {hook}(self, model, now):\n        {line}\n\n    {DEF_LOSS}"
    return Mistake(name, [(f"    {DEF_LOSS}", given)], shown or line, found, fix)


MISTAKES = [
    # ---- what is imported and made
    Mistake("a name that is not there", [("CALLS = ", "LIMIT = DEPTH * 2\nCALLS = ")], "LIMIT = DEPTH * 2", "NameError.*DEPTH"),
    Mistake(
        "a package that is not there",
        [("import torch\n", "import torch\nimport nowhere_to_be_found\n")],
        "import nowhere_to_be_found",
        "ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        "install what it imports",
    ),
    Mistake(
        "a syntax error in a module beside",
        [("import torch\n", "import torch\nfrom tiny import beside\n")],
        "def f(:",
        "SyntaxError",
        files={"tiny/beside.py": "def f(:\n    pass\n"},
        file="tiny/beside.py",
    ),
    Mistake("an exit at import", [("CALLS = ", 'exit("no")\nCALLS = ')], 'exit("no")', "SystemExit: no"),
    Mistake(
        "a pipeline that raises",
        [("    sources = {split", '    SIZES["test"]\n    sources = {split')],
        'SIZES["test"]',
        "KeyError: 'test'",
    ),
    Mistake(
        "rows that cannot be made",
        [("    x = np.random", '    open("/no/such/file")\n    x = np.random')],
        'open("/no/such/file")',
        "FileNotFoundError",
    ),
    Mistake(
        "a source that cannot be read",
        [
            (
                "def rows()",
                "class Own(ArraySource):\n    def read(self, fragment):\n        return self.cache[fragment]\n\n\ndef rows()",
            ),
            ("split: ArraySource(", "split: Own("),
        ],
        "return self.cache[fragment]",
        r"AttributeError.*'cache'.*split 'train'",
        "Correct the source",
    ),
    Mistake(
        "a task that cannot be made",
        [("        self.num_features = 2", "        self.num_features = int('two')")],
        "self.num_features = int('two')",
        "ValueError",
    ),
    Mistake("no evaluate", [("def evaluate(", "def measure(")], "class Net(Task):", "without evaluate", "Define evaluate"),
    # ---- what is done to rows
    Mistake(
        "a check that raises",
        [("    return {}\n", '    return {0: "bad"} if rows["y"] else {}\n')],
        'return {0: "bad"} if rows["y"] else {}',
        "KeyError: 'y'.*split 'train'",
        "Correct the pipeline's check",
    ),
    Mistake(
        "a check that gives nothing", [("    return {}\n", "    pass\n")], "def check(rows):", "None", "Return an empty dict"
    ),
    Mistake(
        "a transform that raises",
        [(CHANGE, "    return scale(rows)\n\n\ndef collate")],
        "return scale(rows)",
        r"NameError: name 'scale' is not defined.*split 'train'",
        "Correct the pipeline's transform",
    ),
    Mistake(
        "a transform that gives fewer rows",
        [(CHANGE, "    return {name: column[1:] for name, column in rows.items()}\n\n\ndef collate")],
        DEF_CHANGE,
        "11 rows, made of 12",
        "not their number",
    ),
    Mistake(
        "a transform that gives nothing",
        [(CHANGE, "    rows['x'] = rows['x'] * 2\n\n\ndef collate")],
        DEF_CHANGE,
        "None",
        "return the rows",
    ),
    Mistake(
        "lengths of other rows",
        [("collate=collate, check=check)", "collate=collate, check=check, length=long)"), ("def rows()", LONG + "def rows()")],
        "def long(rows):",
        "11",
        "Correct the pipeline's length",
    ),
    Mistake(
        "a column that is left out",
        [(CHANGE, '    return {"x": rows["x"]}\n\n\ndef collate')],
        COLLATE.strip(),
        "KeyError: 'label'",
        "Correct the pipeline's collate",
    ),
    Mistake(
        "a column that cannot travel",
        [(CHANGE, '    return {**rows, "tag": np.array([None] * len(rows["x"]))}\n\n\ndef collate')],
        DEF_CHANGE,
        "column 'tag'.*cannot travel",
        "transform",
    ),
    Mistake(
        "a collate that raises",
        [(COLLATE, COLLATE.replace('rows["label"]', 'rows["y"]'))],
        COLLATE.replace('rows["label"]', 'rows["y"]').strip(),
        "KeyError: 'y'.*rows 2, 0, 1",
        "collate",
    ),
    Mistake("a collate that gives nothing", [(COLLATE, "    pass\n")], "def collate(rows):", "None", "return the batch"),
    Mistake(
        "a collate that writes to what it was given",
        [(COLLATE, '    rows["x"] *= 2\n' + COLLATE)],
        'rows["x"] *= 2',
        "ValueError.*read-only",
    ),
    # ---- the model and its loss
    Mistake("a build that gives no model", [(BUILD, "        return nn.Linear\n")], DEF_BUILD, "a type", "return the model"),
    Mistake(
        "a model with state that is no tensor",
        [(BUILD, NOTES_IN_STATE + BUILD.replace("nn.Sequential", "Noted"))],
        DEF_BUILD,
        "a model whose state '_extra_state' is no tensor",
        "register_buffer",
    ),
    Mistake(
        "a build that raises",
        [(BUILD, "        return nn.Linear(self.width, 3)\n")],
        "return nn.Linear(self.width, 3)",
        "AttributeError.*'width'",
        "build",
    ),
    Mistake(
        "shapes that do not fit",
        [("self.num_features = 2", "self.num_features = 3")],
        'scores = model(batch["x"])',
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied",
    ),
    Mistake(
        "a frozen model",
        [(BUILD, "        return nn.Linear(2, 3).requires_grad_(False)\n")],
        DEF_BUILD,
        "none of which requires a gradient",
        "something to train",
    ),
    Mistake(
        "a model without parameters",
        [(BUILD, "        return nn.Identity()\n")],
        DEF_BUILD,
        "no parameters for objective 'loss'",
        "something to train",
    ),
    Mistake(
        "a batch norm before a last batch of one row",
        [(BUILD, f"        {BATCH_NORM}\n")],
        'scores = model(batch["x"])',
        r"Expected more than 1 value per channel",
    ),
    Mistake(
        "objectives that name what is not there",
        [
            (
                "    def loss(",
                "    def objectives(self):\n        return [Objective('loss', self.loss, ('head',))]\n\n    def loss(",
            )
        ],
        "def objectives(self):",
        "trains \\['head'\\]",
        "Name submodules of Sequential: 0, 1, 2",
    ),
    Mistake(
        "no objectives",
        [("    def loss(", "    def objectives(self):\n        return []\n\n    def loss(")],
        "def objectives(self):",
        r"list \[0\]",
    ),
    _loss("a column that is not there", 'return functional.cross_entropy(scores, batch["weight"])', "KeyError: 'weight'"),
    _loss(
        "a loss of each row",
        'return functional.cross_entropy(scores, batch["label"], reduction="none")',
        r"a tensor of shape \(8,\)",
        r"loss\.mean\(\)",
        DEF_LOSS,
    ),
    _loss("labels of a wrong type", 'return functional.cross_entropy(scores, batch["label"].float())', "RuntimeError.*Long"),
    _loss("a number of rows in the code", "return scores.view(16, 3).mean()", r"RuntimeError: shape '\[16, 3\]' is invalid"),
    _loss(
        "a loss that is a number",
        'return functional.cross_entropy(scores, batch["label"]).item()',
        "a float",
        "the tensor that it computes",
        DEF_LOSS,
    ),
    _loss(
        "a loss that is nothing",
        'functional.cross_entropy(scores, batch["label"])',
        "None",
        "the tensor that it computes",
        DEF_LOSS,
    ),
    _loss(
        "a loss without a gradient",
        'return functional.cross_entropy(scores.detach(), batch["label"])',
        "no weight has a gradient",
        "without detach",
        DEF_LOSS,
    ),
    _loss(
        "a loss that is not a number", "return (scores - 100).log().mean()", "a loss of nan.*all finite", "logarithm", DEF_LOSS
    ),
    Mistake(
        "a model that gives two things",
        [(BUILD, BUILD), ('        scores = model(batch["x"])\n' + LOSS, '        scores = model(batch["x"]), None\n' + LOSS)],
        LOSS.strip(),
        "TypeError.*tuple",
    ),
    Mistake(
        "labels that the model has no output for",
        [(BUILD, "        return nn.Linear(self.num_features, 2)\n")],
        LOSS.strip(),
        "IndexError: Target 2 is out of bounds",
    ),
    # ---- evaluation and registration
    Mistake(
        "an evaluation that gives a mean",
        [(".float(), ", ".float().mean(), ")],
        DEF_EVALUATE,
        r"'accuracy': float32 \[\] for 5 rows",
        "one value per row",
    ),
    Mistake(
        "an evaluation that gives a number",
        [(".float(), ", ".float().mean().item(), ")],
        DEF_EVALUATE,
        "'accuracy': a float for 5 rows",
        "one value per row",
    ),
    Mistake("an evaluation that gives nothing", [(MEASURED, "        pass\n")], DEF_EVALUATE, "None", "Return a dict"),
    Mistake(
        "an evaluation that raises",
        [(MEASURED, MEASURED.replace('batch["label"]', 'batch["truth"]'))],
        MEASURED.replace('batch["label"]', 'batch["truth"]').strip(),
        "KeyError: 'truth'",
        "Correct evaluate",
    ),
    Mistake(
        "a total whose shape follows the rows",
        [("Total(torch.tensor(len(scores)))", "Total(scores)"), ('"validation": 10', '"validation": 17')],
        DEF_EVALUATE,
        "the Total 'rows' of shapes",
        "one shape",
    ),
    Mistake(
        "a metric that is not measured",
        job=[("validation/accuracy", "validation/f1")],
        field="checkpoint.metric",
        found="'validation/f1'",
        fix="validation/accuracy",
    ),
    Mistake(
        "a metric that is a total",
        job=[("validation/accuracy", "validation/rows")],
        field="checkpoint.metric",
        found="which is a Total",
        fix="validation/accuracy",
    ),
    Mistake(
        "a metric of training",
        job=[("validation/accuracy", "train/loss")],
        field="checkpoint.metric",
        found="'train/loss'",
        fix="Write validation/",
    ),
    Mistake(
        "a split that is not there",
        job=[("register:", "evaluate: [{split: validation, every_epochs: 1}, {split: tset}]\nregister:")],
        field="evaluate.1.split",
        found="'tset'",
        fix="Known: train, validation|train",
    ),
    Mistake(
        "early stopping by what is measured at the end",
        job=[
            ("epochs: 2,", "epochs: 2, early_stopping: {metric: validation/accuracy, mode: max},"),
            ("register:", "evaluate: [{split: validation}]\nregister:"),
        ],
        field="loop.early_stopping.metric",
        found="at the end of the training only",
        fix="every_epochs or every_steps",
    ),
    Mistake(
        "early stopping by a metric that is not measured",
        job=[("epochs: 2,", "epochs: 2, early_stopping: {metric: validation/acuracy, mode: max},")],
        field="loop.early_stopping.metric",
        found="'validation/acuracy'",
        fix="validation/accuracy",
    ),
    Mistake(
        "epochs and steps",
        job=[("epochs: 2,", "epochs: 2, steps: 7,")],
        field="loop",
        found="give epochs or steps|epochs",
        fix="",
    ),
    Mistake(
        "too few values that are kept",
        [('"rows": Total(torch.tensor(len(scores)))}', '"rows": Kept(scores[:1])}')],
        DEF_EVALUATE,
        "Kept of 1 values for [58] rows",
        "one value for each row",
    ),
    Mistake(
        "a conclusion from what is not kept",
        [(INPUTS, CONCLUDE + '        return {"score": kept["scores"].sum()}\n\n' + INPUTS)],
        'return {"score": kept["scores"].sum()}',
        "KeyError: 'scores'",
        "Correct conclude",
    ),
    Mistake(
        "a conclusion that is no number",
        [(INPUTS, CONCLUDE + '        return {"table": totals["rows"].repeat(3)}\n\n' + INPUTS)],
        "def conclude(self, kept, totals):",
        r"'table': float64 \[3\]",
        "Correct conclude",
    ),
    Mistake(
        "a picture of no shape",
        [(INPUTS, '    def pictures(self, model, now):\n        return {"noise": Picture(torch.zeros(4))}\n\n' + INPUTS)],
        "def pictures(self, model, now):",
        r"a picture of shape \(4,\)",
        "Correct pictures",
    ),
    Mistake(
        "no inputs for a model that is registered",
        [("def inputs(", "def arguments(")],
        "class Net(Task):",
        r"neither predict\(model, batch\) nor inputs\(batch\)",
        "leave out `register:`",
    ),
    Mistake(
        "a predict that answers once for all rows",
        [(INPUTS, '    def predict(self, model, batch):\n        return {"best": model(batch["x"]).amax()[None]}\n\n' + INPUTS)],
        "def predict(self, model, batch):",
        r"'best': float32 \[1\] for 8 rows",
        "one value for each row",
    ),
    Mistake(
        "a predict that gives no names",
        [(INPUTS, '    def predict(self, model, batch):\n        return model(batch["x"])\n\n' + INPUTS)],
        "def predict(self, model, batch):",
        r"float32 \[8, 3\]",
        "Return a dict",
    ),
    Mistake(
        "a forward that is no answer per row, and no predict",
        [
            ("nn.Linear(4, 3))\n", "nn.Linear(4, 3), nn.Flatten(0))\n"),
            (
                'scores = model(batch["x"])\n        return functional',
                'scores = model(batch["x"]).view(-1, 3)\n        return functional',
            ),
            ('scores = model(batch["x"])\n        return {', 'scores = model(batch["x"]).view(-1, 3)\n        return {'),
        ],
        "",
        r"'output': float32 \[24\] for 8 rows",
        "Define predict",
    ),
    Mistake(
        "a collate that looks at the answer where a model is asked",
        [("check=check)", "check=check, targets=['label'])")],
        COLLATE.strip(),
        "KeyError: 'label'",
    ),
    Mistake(
        "a target that is no column",
        [("check=check)", "check=check, targets=['labels'])")],
        found="'labels'",
        fix="Did you mean 'label'",
    ),
    Mistake(
        "a transform that draws at random where a model is asked",
        [(CHANGE, "    rows['x'] = rows['x'] + generator.normal(size=rows['x'].shape).astype(np.float32)\n" + CHANGE)],
        "def change(rows, split, generator):",
        "other rows at each call",
        "only if split == 'train'",
    ),
    Mistake(
        "a graph that hangs on values, where an export is required",
        [(BUILD, "        return Branching()\n"), ("class Net(Task):\n", BRANCHING + "class Net(Task):\n")],
        job=[("{model: tiny}", "{model: tiny, export: required}")],
        field="register.export",
        found="data-dependent.*in forward: if x.sum",
        fix="register.export: try",
    ),
    # ---- what a loss is over, and what is done behind a step
    _loss("a mapping without a loss", "return {'total': scores.mean()}", "total float32", "'loss'", DEF_LOSS),
    _loss("a part of many numbers", "return {'loss': scores.mean(), 'each': scores}", "the part 'each'", "one number", DEF_LOSS),
    _loss(
        "a part named as what the engine logs",
        "return {'loss': scores.mean(), 'gradient_norm': 1}",
        "a part named 'gradient_norm'",
        "that the engine does not log",
        DEF_LOSS,
    ),
    _objective(
        "a weight that is negative",
        "weight=lambda batch: -1.0",
        "return [Objective('loss', self.loss, weight=lambda batch: -1.0)]",
        "-1.0",
        "Correct what weighs",
    ),
    _objective(
        "a weight for each row",
        "weight=lambda batch: batch['label']",
        "return [Objective('loss', self.loss, weight=lambda batch: batch['label'])]",
        "int64 \\[8\\]",
        "Correct what weighs",
    ),
    _objective(
        "features without a gradient",
        "features=lambda model, batch: model(batch['x']).detach()",
        "return [Objective('loss', self.loss, features=lambda model, batch: model(batch['x']).detach())]",
        "no weight has a gradient",
        "without detach",
    ),
    _objective(
        "features and a weight",
        "features=abs, weight=len",
        "def objectives(self):",
        "with weight and features",
        "Weigh the rows in the loss",
    ),
    Mistake(
        "a part that another objective logs",
        [
            (f"    {DEF_LOSS}", TWO_OBJECTIVES + f"    {DEF_LOSS}"),
            (LOSS, "        return {'loss': scores.mean(), 'other_loss': scores.std()}\n"),
        ],
        DEF_LOSS,
        "logged as other_loss, as what objective 'other' logs",
        "names of their own",
        job=[("{kind: SGD, lr: 0.1, momentum: 0.9}", "{loss: {kind: SGD, lr: 0.1}, other: {kind: SGD, lr: 0.1}}")],
    ),
    _behind("a hook that fails", "after_step", "model[7].weight.zero_()", "IndexError", "Correct after_step"),
    _behind(
        "a buffer that is made behind a step",
        "after_step",
        "model.register_buffer('mask', torch.ones(2))",
        "other parameters or buffers.*mask",
        "in build",
        "def after_step(self, model, now):",
    ),
    _behind("a hook at an epoch's end that fails", "after_epoch", "now.loss", "AttributeError", "Correct after_epoch"),
    Mistake(
        "inputs that are no tuple",
        [('return (batch["x"],)', 'return batch["x"]')],
        DEF_INPUTS,
        r"float32 \[8, 2\]",
        "Return a tuple",
    ),
    Mistake(
        "inputs that the model does not take",
        [('return (batch["x"],)', 'return (batch["x"], batch["label"])')],
        "",
        "TypeError.*forward\\(\\) takes 2 positional arguments",
        "Correct inputs",
    ),
    # ---- what torch makes of the job
    Mistake(
        "a schedule that is too short",
        job=[("scale:", "schedule: {kind: OneCycleLR, max_lr: 0.1, total_steps: 3}\nscale:")],
        field="schedule",
        found="OneCycleLR for 3 steps",
        fix="Leave out total_steps",
    ),
    Mistake(
        "a schedule that does not go with the optimizer",
        job=[
            ("{kind: SGD, lr: 0.1, momentum: 0.9}", "{kind: Adagrad}"),
            ("scale:", "schedule: {kind: OneCycleLR, max_lr: 0.1}\nscale:"),
        ],
        field="schedule",
        found="ValueError: optimizer must support momentum",
        fix="Correct schedule",
    ),
    Mistake(
        "an optimizer that torch refuses",
        job=[("lr: 0.1,", "lr: -0.1,")],
        field="optimizer",
        found="ValueError: Invalid learning rate",
        fix="Correct optimizer",
    ),
    Mistake(
        "optimizers for other objectives",
        job=[("{kind: SGD, lr: 0.1, momentum: 0.9}", "{left: {kind: SGD, lr: 0.1}, right: {kind: SGD, lr: 0.1}}")],
        field="optimizer",
        found="optimizers for \\['left', 'right'\\]",
        fix="Name them so",
    ),
]
