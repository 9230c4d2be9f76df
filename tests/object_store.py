"""An S3 server on this machine (moto's) behind a bad connection: a proxy that drops connections,
stalls, cuts bodies off and answers 503, at seeded moments.
"""

from __future__ import annotations

import http.client
import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "bucket"
FAULTS = ("drop", "stall", "truncate", "503")
STALL_SECONDS = 0.5
# one try of botocore's, and patience shorter than a stall: what is tried again is tried by us
PATIENCE = {"read_timeout": 0.2, "retries": {"total_max_attempts": 1}}
PER_CONNECTION = ("connection", "content-length", "transfer-encoding")
ERROR = '<?xml version="1.0"?><Error><Code>{}</Code><Message>{}</Message></Error>'


class Store:
    """The bucket behind the proxy. A fault comes with probability `rate` for each request; while
    `always` names one, it always comes.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        self.moto = self._moto.get_host_and_port()
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._proxy.server_port}"
        self.rate, self.always, self.random = 0.0, "", random.Random(0)
        self.faults: Counter[str] = Counter()
        self.requests, self.bytes = 0, 0
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "FSSPEC_S3": json.dumps({"config_kwargs": PATIENCE}),
        }

    def stop(self) -> None:
        self._proxy.shutdown()
        self._moto.stop()

    def fault(self) -> str:
        self.requests += 1
        drawn = self.random.choice(FAULTS) if self.random.random() < self.rate else ""
        found = self.always or drawn
        self.faults[found] += 1
        return found

    def files(self) -> Any:
        """fsspec's view of it, straight to moto's server."""
        endpoint = "http://{}:{}".format(*self.moto)
        public = {"ACL": "public-read"}
        files = fsspec.filesystem(
            "s3", endpoint_url=endpoint, s3_additional_kwargs=public, use_listings_cache=False
        )
        if not files.exists(BUCKET):
            files.mkdir(BUCKET)
        return files

    def put(self, path: Path, name: str | None = None) -> str:
        """Store a file or folder; returns its address."""
        name = name or path.name
        self.files().put(str(path), f"{BUCKET}/{name}", recursive=path.is_dir())
        return f"s3://{BUCKET}/{name}"

    @contextmanager
    def bad(self, rate: float, seed: int = 0) -> Iterator[None]:
        self.rate, self.random, self.faults = rate, random.Random(seed), Counter()
        try:
            yield
        finally:
            self.rate = 0.0


def _handler_of(store: Store) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: object) -> None:
            pass

        def forward(self) -> None:
            fault = store.fault()
            if fault == "stall":
                time.sleep(STALL_SECONDS)
            if fault in ("drop", "stall"):
                self.close_connection = True
                return
            if fault in ("503", "403"):
                code = {"503": "ServiceUnavailable", "403": "AccessDenied"}[fault]
                self.answer(int(fault), {}, ERROR.format(code, "by the proxy").encode())
                return
            headers = dict(self.headers)
            if fault == "no ranges":
                headers.pop("Range", None)
            body = self.rfile.read(int(headers.get("Content-Length", 0)))
            server = http.client.HTTPConnection(*store.moto)
            server.request(self.command, self.path, body, headers)
            found = server.getresponse()
            data = found.read()
            told = dict(found.headers.items())
            self.answer(found.status, told, data, fault)
            server.close()

        def answer(
            self, status: int, headers: dict[str, str], data: bytes, fault: str = ""
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in PER_CONNECTION:
                    self.send_header(name, value)
            if fault == "no size":
                self.close_connection = True
            else:
                size = headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", size or str(len(data)))
            self.end_headers()
            sent = data[: len(data) // 2] if fault == "truncate" else data
            self.close_connection |= len(sent) < len(data)
            store.bytes += len(sent)
            if self.command != "HEAD":
                self.wfile.write(sent)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815

    return Handler


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """The environment of this process points at it."""
    with pytest.MonkeyPatch.context() as patch:
        found = Store()
        for name, value in found.environment.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "s3", {"config_kwargs": PATIENCE})
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield found
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        found.stop()
