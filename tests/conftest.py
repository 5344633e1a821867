"""What every test starts from: a state folder of its own, no outside addresses, and the same random cases each time."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings

# A shared machine is slow at times; that is no failure of the code. Fixed cases make a red run repeatable.
settings.register_profile("raymill", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("raymill")


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for `.raymill/` during one test, so that none writes into the project's own."""
    folder = tmp_path / "raymill"
    monkeypatch.setenv("RAYMILL_HOME", str(folder))
    for address in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(address, raising=False)
    return folder


# A shell ignores Ctrl-C in what it starts in the background, and so would every command that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
