"""Is what is installed what was meant to be, and is anything known against it?

    python .ci/audit.py

Looks at three things and ends with 1 if any is not as it should be, or could not be looked at:

* files: each file of each installed distribution against the SHA-256 in its RECORD, and files that no RECORD names. (Byte code is
  left out: Python makes it anew from the sources where they are newer, and RECORD has no hash of it.)
* versions: the installed distributions against constraints.txt.
* advisories: each version of constraints.txt against the database that pip-audit asks. Where it cannot be reached, that is said,
  and is no pass.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

PROJECT = Path(__file__).parents[1]
OURS = {"raymill"}
INSTALLER = {"pip"}
"""Comes with Python's venv, not by constraints.txt."""

FOR_BUILDING = {"editables"}
"""What builds an editable package, in an environment that pip removes again."""

LOOK_UP_TIMEOUT_S = 900.0


def name_of(name: str) -> str:
    """A distribution's name as all spellings of it are written here."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(site_packages: Path) -> list[Distribution]:
    """The distributions of an environment, by name."""
    return sorted(distributions(path=[str(site_packages)]), key=lambda found: name_of(found.name))


# ---------------------------------------------------------------- files


def file_problems(site_packages: Path) -> Iterator[str]:
    """Each file that is not as its distribution's RECORD says, and each that is of no distribution."""
    known = set()
    for distribution in installed(site_packages):
        who = f"{distribution.name} {distribution.version}"
        if distribution.files is None:
            yield f"{who}: no RECORD of its files"
        for file in distribution.files or ():
            path = Path(str(file.locate())).resolve()
            known.add(path)
            if path.suffix == ".pyc":
                continue
            if not path.is_file():
                yield f"{who}: {file} is gone"
            elif file.hash is not None and digest_of(path, file.hash.mode) != file.hash.value:
                yield f"{who}: {file} is not what was installed: its {file.hash.mode} differs from RECORD"
    for path in sorted(site_packages.rglob("*")):
        if path.is_file() and path.suffix != ".pyc" and path.resolve() not in known:
            yield f"{path.relative_to(site_packages)} is of no distribution"


def digest_of(path: Path, mode: str) -> str:
    """A file's digest in the spelling of RECORD."""
    with path.open("rb") as file:
        return base64.urlsafe_b64encode(hashlib.file_digest(file, mode).digest()).rstrip(b"=").decode()


# ---------------------------------------------------------------- versions


def pinned(constraints: Path) -> dict[str, str]:
    """Name -> version, of each line `name==version`."""
    lines = (line.partition("#")[0].strip() for line in constraints.read_text().splitlines())
    pairs = (line.partition(";")[0].strip().split("==") for line in lines if line)
    return {name_of(name): version for name, version in pairs}


def version_problems(site_packages: Path, constraints: Path) -> Iterator[str]:
    """Each distribution that is there in another version, beside the constraints, twice, or not at all."""
    wanted, seen = pinned(constraints), set()
    for distribution in installed(site_packages):
        name, version = name_of(distribution.name), distribution.version
        if name in OURS | INSTALLER:
            continue
        if name in seen:
            yield f"{name}: installed more than once, also as {version}"
        elif name not in wanted:
            yield f"{name} {version} is installed; {constraints.name} does not name it"
        elif version != wanted[name]:
            yield f"{name}: {version} is installed; {constraints.name} says {wanted[name]}"
        seen.add(name)
    for name in sorted(wanted.keys() - seen - FOR_BUILDING):
        yield f"{name} {wanted[name]} of {constraints.name} is not installed"


# ---------------------------------------------------------------- advisories


def advisory_problems(constraints: Path, service: str | None) -> Iterator[str]:
    """Each advisory against a pinned version.

    Args:
        service: the address of a database that answers as OSV's does; None: pip-audit's own.

    Raises:
        LookupError: the database did not answer for all of them.
    """
    where = ["--osv-url", service] if service else []
    with tempfile.TemporaryDirectory(prefix="raymill-audit-") as cache:
        command = [
            *(sys.executable, "-P", "-m", "pip_audit", "--requirement", str(constraints), "--no-deps", "--disable-pip"),
            *("--vulnerability-service", "osv", *where, "--timeout", "15", "--cache-dir", cache),
            *("--format", "json", "--progress-spinner", "off"),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_UP_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise LookupError(f"no answer within {LOOK_UP_TIMEOUT_S:g} s") from error
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError as error:
        raise LookupError((done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]) from error
    if missing := pinned(constraints).keys() - {name_of(entry["name"]) for entry in found if "vulns" in entry}:
        raise LookupError(f"no answer for {', '.join(sorted(missing))}")
    for entry in found:
        for advisory in entry["vulns"]:
            names = ", ".join([advisory["id"], *advisory["aliases"]])
            fixed = f"fixed in {', '.join(advisory['fix_versions'])}" if advisory["fix_versions"] else "not fixed yet"
            yield f"{entry['name']} {entry['version']}: {names}, {fixed}: {advisory['description'].strip()[:200]}"


# ---------------------------------------------------------------- all of it


def main(argv: Sequence[str] | None = None) -> int:
    """Look, say what is wrong, and return the exit code."""
    parser = argparse.ArgumentParser(description="Audit what is installed.")
    parser.add_argument("--site-packages", type=Path, default=Path(sysconfig.get_path("purelib")))
    parser.add_argument("--constraints", type=Path, default=PROJECT / "constraints.txt")
    parser.add_argument("--advisories", metavar="URL", help="a database that answers as OSV's does")
    arguments = parser.parse_args(argv)
    failed = False
    for what, problems in (
        ("files", file_problems(arguments.site_packages)),
        ("versions", version_problems(arguments.site_packages, arguments.constraints)),
        ("advisories", advisory_problems(arguments.constraints, arguments.advisories)),
    ):
        try:
            found = list(problems)
        except LookupError as error:
            found = [f"COULD NOT BE LOOKED UP, so nothing is known of them: {error}"]
        print("\n".join([f"{what}: {len(found) or 'no'} problems", *(f"  {problem}" for problem in found)]), flush=True)
        failed |= bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
