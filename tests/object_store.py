"""A real S3 service on loopback (moto's), in this process, which can be told to fail: with errors, slowly, or in the middle."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Application = Callable[..., Iterable[bytes]]

KINDS = ("500", "503", "cut", "slow")
"""What can go wrong with an answer."""

NOWHERE = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Quiet(WSGIRequestHandler):
    """Tells nobody of each request."""

    def log_request(self, *args: Any) -> None:
        """Say nothing."""


@dataclass
class ObjectStore:
    """The service.

    Attributes:
        fault: is told number, method and path of each request; what goes wrong with it, one of `KINDS`, or None.
        requests: those that came, as "METHOD path".
        faults: how many went wrong.
    """

    application: Application
    fault: Callable[[int, str, str], str | None] = lambda number, method, path: None
    requests: list[str] = field(default_factory=list)
    faults: int = 0
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request."""
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self.lock:
            self.requests.append(f"{method} {path}")
            number = len(self.requests)
        kind = self.fault(number, method, path)
        with self.lock:
            self.faults += kind is not None
        if kind in ("500", "503"):
            code, text = ("InternalError", "500 Internal Server Error") if kind == "500" else ("SlowDown", "503 Slow Down")
            start_response(text, [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()]
        if kind == "slow":
            time.sleep(0.1)
        answer = self.application(environ, start_response)
        if kind == "cut" and method == "GET":
            whole = b"".join(answer)
            return [whole[: len(whole) // 2]]
        return answer

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it."""
        return {**NOWHERE, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    @property
    def client(self) -> Any:
        """Of boto3."""
        names = {"aws_access_key_id": "nobody", "aws_secret_access_key": "nothing", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}", **names)

    def upload(self, folder: Path, bucket: str) -> str:
        """Make a bucket of all files of a folder; its address."""
        self.client.create_bucket(Bucket=bucket)
        for path in sorted(one for one in folder.rglob("*") if one.is_file()):
            self.client.put_object(Bucket=bucket, Key=path.relative_to(folder).as_posix(), Body=path.read_bytes())
        return f"s3://{bucket}"


@contextmanager
def serving() -> Iterator[ObjectStore]:
    """The service, while this lasts; this process finds it."""
    store = ObjectStore(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=Quiet)
    store.port = server.server_port
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    before = {name: os.environ.get(name) for name in store.environment}
    os.environ.update(store.environment)
    try:
        yield store
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.shutdown()
        thread.join()
        server.server_close()
