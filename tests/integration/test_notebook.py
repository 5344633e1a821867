"""raymill in a notebook: training in a cell shows what it does, and its result is a table."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = [
    "import raymill\njob = raymill.load('smoke', loop__epochs=3)\njob.check()",
    "run = job.train(in_process=True)",
    "history = run.history()\nprint(run.status, history.index[-1], sorted(history.columns))\nhistory.tail(2)",
    "raymill.runs()[0].run_id == run.run_id",
]


# ipykernel and jupyter_client say this about themselves.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_training_in_a_notebook_shows_a_panel_and_gives_a_table() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    checked, trained, told, listed = ([dict(output) for output in cell.outputs] for cell in notebook.cells)
    assert "{'train': 600, 'validation': 120}" in checked[0]["data"]["text/plain"]
    panels = [output["data"]["text/plain"] for output in trained if output["output_type"] == "display_data"]
    steps = [panel for panel in panels if "waiting for data" in panel]
    assert len(steps) == 1, "one panel is redrawn, not one after the other shown"
    assert " / 30" in steps[0]
    lines = "".join(output.get("text", "") for output in trained) + "".join(panels)
    assert "first step done" in lines
    history = [line.split() for line in steps[0].splitlines()]
    assert ["epoch", "step", "validation/accuracy", "validation/loss"] in history
    assert [line[:2] for line in history if line[:1] in (["0"], ["1"], ["2"])] == [["0", "10"], ["1", "20"], ["2", "30"]]
    assert told[0]["text"].startswith("finished 30 ['epoch', 'time_s', 'train/gradient_norm'")
    assert "<table" in told[1]["data"]["text/html"]
    assert listed[0]["data"]["text/plain"] == "True"
