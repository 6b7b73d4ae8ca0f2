"""An S3 server inside the test's own process, which says what was asked of it."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.moto_api._internal import moto_api_backend
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "team"
OTHER_SETTINGS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE")


class Storage:
    """asked: requests, as (method, bucket and key); a listing has the bucket alone."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, str]] = Counter()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._count, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.port}"

    def _count(self, environ: dict[str, Any], respond: Any) -> Any:
        self.asked[environ["REQUEST_METHOD"], environ["PATH_INFO"].strip("/")] += 1
        return self._app(environ, respond)

    @contextmanager
    def running(self) -> Iterator["Storage"]:
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            moto_api_backend.reset()
            self.client = boto3.client("s3")
            self.client.create_bucket(Bucket=BUCKET)
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def secrets(self) -> list[str]:
        return ["key-of-a-test", "secret-of-a-test"]

    def settings(self) -> dict[str, str]:
        """Environment variables that lead there; the server takes any credentials."""
        keys = dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), self.secrets(), strict=True))
        return keys | {"AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}

    def put(self, folder: Path, prefix: str) -> str:
        """Copy a folder's files there; returns the address."""
        for file in folder.iterdir():
            self.client.put_object(Bucket=BUCKET, Key=f"{prefix}/{file.name}", Body=file.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def objects_read(self, prefix: str) -> set[str]:
        """The names under a prefix whose content was asked for."""
        start = f"{BUCKET}/{prefix}/"
        return {key.removeprefix(start) for method, key in self.asked if method == "GET" and key.startswith(start)}


@contextmanager
def storage() -> Iterator[Storage]:
    """A server with one empty bucket, and an environment that leads to it."""
    server = Storage()
    with pytest.MonkeyPatch.context() as patch:
        for name in OTHER_SETTINGS:
            patch.delenv(name, raising=False)
        for name, value in server.settings().items():
            patch.setenv(name, value)
        with server.running():
            yield server
