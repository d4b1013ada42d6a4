"""A Hugging Face Hub on this machine, with what its client asks for, for the tests."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" + "0" * 34
OLDER = "decaf" + "0" * 35


@dataclass
class Hub:
    """The repositories, what is wrong with them, and what was asked.

    Args:
        url: where it answers.
        repositories: folder by name and commit; the branch main is `COMMIT`, the tag v1 is `OLDER`.
        gated: repositories whose files nobody may read.
        broken: status that every answer has.
        sent: names of the files that were sent.
        user: who asks, as the Hub tells it; None for nobody.
        made: what was asked for of every repository that was made.
        received: files that were put into repositories, by repository and name.
        refused: what is wrong with every card.
    """

    url: str
    repositories: dict[tuple[str, str], Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: int | None = None
    sent: list[str] = field(default_factory=list)
    user: dict[str, Any] | None = None
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    received: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refused: str | None = None

    def add(self, name: str, folder: Path, commit: str = COMMIT) -> None:
        """Publish a folder."""
        self.repositories[name, commit] = folder


def _answer(hub: Hub, request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
    path = unquote(urlsplit(request.path).path)
    if hub.broken:
        return hub.broken, {}, b""
    if path == "/api/whoami-v2":
        return (200, {}, json.dumps(hub.user).encode()) if hub.user else (401, {}, b"")
    match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/auth-check", path)
    if match:
        return (403, {"X-Error-Code": "GatedRepo"}, b"") if match[1] in hub.gated else (200, {}, b"")
    match = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/(.+))?", path) or re.fullmatch(
        r"/([^/]+/[^/]+)/(resolve)/([^/]+/.+)", path
    )
    if match is None or match[1] not in {name for name, _ in hub.repositories}:
        return 401, {"X-Error-Code": "RepoNotFound"}, b""
    revision, _, file = (match[3] or "main").partition("/") if match[2] == "resolve" else (match[3] or "main", "", "")
    commit = {"main": COMMIT, "v1": OLDER}.get(revision, revision)
    folder = hub.repositories.get((match[1], commit))
    if folder is None:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b""
    if match[2] == "resolve":
        return _file(hub, match[1], folder / file, commit, request.command)
    files = [
        {"path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _digest(path), "type": "file"}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    if match[2] == "tree":
        return 200, {}, json.dumps(files).encode()
    siblings = [{"rfilename": file["path"], "size": file["size"], "blobId": file["oid"]} for file in files]
    gated: Any = "auto" if match[1] in hub.gated else False
    return 200, {}, json.dumps({"id": match[1], "sha": commit, "siblings": siblings, "gated": gated}).encode()


def _take(hub: Hub, request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
    """What is asked to be made or kept: repositories, and files in the text of a commit."""
    path = unquote(urlsplit(request.path).path)
    body = request.rfile.read(int(request.headers["Content-Length"]))
    if hub.broken:
        return hub.broken, {}, b""
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        is_new = name not in hub.made and all(name != known for known, _ in hub.repositories)
        if is_new:
            hub.made[name] = asked
        return (200 if is_new else 409), {}, json.dumps({"url": f"{hub.url}/{name}"}).encode()
    if path == "/api/validate-yaml":
        errors = [{"message": hub.refused}] if hub.refused else []
        return (400 if errors else 200), {}, json.dumps({"errors": errors, "warnings": []}).encode()
    name, action = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path).groups()  # type: ignore[union-attr]
    if action == "preupload":
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
        ]
        return 200, {}, json.dumps({"files": files}).encode()
    lines = [json.loads(line) for line in body.splitlines()]
    files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
    hub.received.setdefault(name, {}).update({file: b64decode(content) for file, content in files.items()})
    return 200, {}, json.dumps({"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}).encode()


def _file(hub: Hub, name: str, file: Path, commit: str, command: str) -> tuple[int, dict[str, str], bytes]:
    if name in hub.gated:
        return 403, {"X-Error-Code": "GatedRepo"}, b""
    if command == "GET":
        hub.sent.append(file.name)
    return 200, {"X-Repo-Commit": commit, "ETag": f'"{_digest(file)}"'}, file.read_bytes()


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


@contextmanager
def serving(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub that this process asks, with an empty cache."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*_answer(hub, self))

        def do_POST(self) -> None:
            self._send(*_take(hub, self))

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
