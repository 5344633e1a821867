"""raymill as its users have it: a wheel, installed into an environment that knows nothing of this repository."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from integration.commands import PROJECT


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(PROJECT)], check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("raymill-*.whl")
    return built


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that holds the wheel alone, beside the libraries it needs.

    The libraries are those of this environment, found through a path file. Path files in their folder are not followed, so
    raymill itself comes from the wheel and nothing from this repository.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = folder / "bin" / "raymill"
    command.write_text(f"#!{folder}/bin/python\nfrom raymill.cli import main\nmain()\n")
    command.chmod(0o755)
    return folder / "bin"
