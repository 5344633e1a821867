"""`make audit` can fail: a changed file, another version, an advisory, and a database that does not answer are each named."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

AUDIT = Path(__file__).parents[2] / ".ci" / "audit.py"

# Published in 2023.
REQUESTS_ADVISORY = {
    "id": "GHSA-j8r2-6x86-q33q",
    "aliases": ["CVE-2023-32681", "PYSEC-2023-74"],
    "summary": "Unintended leak of Proxy-Authorization header in requests",
    "affected": [
        {
            "package": {"name": "requests", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "2.3.0"}, {"fixed": "2.31.0"}]}],
        }
    ],
}


def wheel(folder: Path, name: str, version: str) -> Path:
    """A small distribution of one module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "VALUE = 1\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{path},sha256={sha256(text)},{len(text)}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    made = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return made


def sha256(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


class Environment:
    """Two small distributions, installed by pip, and the constraints that they were installed by."""

    def __init__(self, folder: Path) -> None:
        self.site_packages, self.constraints = folder / "site-packages", folder / "constraints.txt"
        self.constraints.write_text("# pins\ntiny==1.0\nother-thing==2.5\n")

    def audit(self, service: str) -> tuple[int, dict[str, list[str]]]:
        """The exit code, and what was said, by what was looked at."""
        arguments = ["--site-packages", str(self.site_packages), "--constraints", str(self.constraints), "--advisories", service]
        done = subprocess.run([sys.executable, str(AUDIT), *arguments], capture_output=True, text=True, timeout=240, check=False)
        assert done.stderr == ""
        said: dict[str, list[str]] = {}
        for line in done.stdout.splitlines():
            if line.startswith("  "):
                said[next(reversed(said))].append(line.strip())
            else:
                said[line.partition(":")[0]] = []
        return done.returncode, said


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    wheels = [str(wheel(folder, name, version)) for name, version in (("tiny", "1.0"), ("other_thing", "2.5"))]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(folder / "site-packages"), *wheels], check=True, timeout=240)
    return folder / "site-packages"


@pytest.fixture
def environment(installed: Path, tmp_path: Path) -> Environment:
    shutil.copytree(installed, tmp_path / "site-packages")
    return Environment(tmp_path)


@contextmanager
def database(advisories: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The address of a server on this machine that answers as OSV's does: name and version -> advisories."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = advisories.get(f"{asked['package']['name']}=={asked['version']}", [])
            body = json.dumps({"vulns": found} if found else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/query"
        finally:
            server.shutdown()
            thread.join()


def test_what_is_as_it_should_be_passes(environment: Environment) -> None:
    with database({}) as service:
        assert environment.audit(service) == (0, {"files": [], "versions": [], "advisories": []})


def test_changed_missing_and_added_files_and_other_versions_are_each_named(environment: Environment) -> None:
    (environment.site_packages / "tiny.py").write_text("VALUE = 2\n")
    (environment.site_packages / "other_thing.py").unlink()
    (environment.site_packages / "sitecustomize.py").write_text("")
    environment.constraints.write_text("tiny==1.1\nabsent==3\n")
    with database({}) as service:
        code, said = environment.audit(service)
    assert code == 1
    assert said["files"] == [
        "other_thing 2.5: other_thing.py is gone",
        "tiny 1.0: tiny.py is not what was installed: its sha256 differs from RECORD",
        "sitecustomize.py is of no distribution",
    ]
    assert said["versions"] == [
        "other-thing 2.5 is installed; constraints.txt does not name it",
        "tiny: 1.0 is installed; constraints.txt says 1.1",
        "absent 3 of constraints.txt is not installed",
    ]
    assert said["advisories"] == []


def test_an_advisory_is_named_with_its_package_version_and_the_fixed_one(environment: Environment) -> None:
    environment.constraints.write_text("tiny==1.0\nother-thing==2.5\nrequests==2.30.0\n")
    with database({"requests==2.30.0": [REQUESTS_ADVISORY]}) as service:
        code, said = environment.audit(service)
    assert code == 1
    (line,) = said["advisories"]
    assert line.startswith("requests 2.30.0: ")
    assert all(name in line for name in ("GHSA-j8r2-6x86-q33q", "CVE-2023-32681", "PYSEC-2023-74"))
    assert "fixed in 2.31.0: Unintended leak of Proxy-Authorization header" in line


def test_a_database_that_does_not_answer_is_no_pass(environment: Environment) -> None:
    with database({}) as service:
        pass
    code, said = environment.audit(service)
    assert code == 1
    (line,) = said["advisories"]
    assert line.startswith("COULD NOT BE LOOKED UP, so nothing is known of them: ")
    assert (said["files"], said["versions"]) == ([], [])
