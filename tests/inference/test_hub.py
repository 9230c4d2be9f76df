"""What is pushed to the Hub, to a server on this machine that the Hub's own client takes for it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from beingvl.errors import InputError
from beingvl.inference.model import BeingVL


class Hub(BaseHTTPRequestHandler):
    """One repository, whose files lie in `files`; `tokens` are those that it was asked with."""

    files: dict[str, bytes]
    created: list[dict]
    tokens: set[str]

    def do_POST(self) -> None:
        self.tokens.add(self.headers["Authorization"])
        length = self.headers["Content-Length"]
        body = self.rfile.read(int(length)) if length else self._chunks()
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            return self._say({"url": self._url()})
        if self.path == "/api/models/me/small/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            known = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self._say({"files": [{"path": path, **known} for path in paths]})
        if self.path == "/api/models/me/small/commit/main":
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    file = entry["value"]
                    self.files[file["path"]] = base64.b64decode(file["content"])
            return self._say({"commitUrl": f"{self._url()}/commit/1", "commitOid": "1" * 40})
        return self._say({}, 200 if self.path == "/api/validate-yaml" else 404)

    def _url(self) -> str:
        return f"http://{self.headers['Host']}/me/small"

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size + 2)[:-2]
        self.rfile.readline()
        return body

    def _say(self, fields: dict[str, Any], status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(fields).encode())

    def log_message(self, *words: Any) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    kind = type("Small", (Hub,), {"files": {}, "created": [], "tokens": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield kind
        server.shutdown()


def test_a_model_is_pushed_with_its_vbpe(
    hub: type[Hub], run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = run_folder / "stage-3" / "final"
    model = BeingVL(final, run_folder / "vbpe")
    address = model.push_to_hub("me/small", private=True, token="hf_secret")
    assert address.endswith("/me/small")
    [created] = hub.created
    assert created["visibility"] == "private" and created["name"] == "small"
    files = {path for path in final.rglob("*") if path.is_file()}
    expected = {path.relative_to(final).as_posix(): path.read_bytes() for path in files}
    expected["vbpe.json"] = (run_folder / "vbpe" / "vbpe.json").read_bytes()
    assert hub.files == expected and hub.tokens == {"Bearer hf_secret"}
    with pytest.raises(InputError, match="final cannot be uploaded to he/large") as error:
        model.push_to_hub("he/large", token="hf_secret")
    with pytest.raises(InputError, match=r"'commit_mesage' is not an option .*'commit_message'"):
        model.push_to_hub("me/small", commit_mesage="hi")
    said = capsys.readouterr()
    assert "hf_secret" not in str(error.value) + said.out + said.err
