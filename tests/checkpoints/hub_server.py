"""A hub on loopback: the endpoints of huggingface.co that huggingface_hub uses for what simlab calls.

Of a repository: its revisions with their files (``/api/models/…``), its refs, and ``/resolve/``, in
parts too. ``fault`` may answer in its place; ``asked`` says what was asked.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from simlab.checkpoints import hub_client

REPO = "org/olmo"
SLEEP = time.sleep  # which the fixture replaces
LARGE = 8192  # bytes; a file of more has its SHA-256 as ETag and a place elsewhere, as in git-lfs
TOKEN = "hf_" + "s3cret" * 5
LOGIN_PAGE = b"<!DOCTYPE html><html><title>Hotel Wi-Fi</title>Please log in</html>"


class Hub(ThreadingHTTPServer):
    """The server. repos: a repository's revisions (branch to commit) and files (by commit)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, tuple[dict[str, str], dict[str, dict[str, bytes]]]] = {}
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.tokens: dict[str, str | None] = {}  # that came with a path
        self.fault: Callable[[_Handler, str], bool] = lambda handler, path: False
        self.more: dict[str, str] = {}  # headers of large files
        self.over = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def store(self) -> str:
        """Where large files are: to huggingface_hub another host, which gets no token."""
        return f"http://localhost:{self.server_port}"

    def push(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Put a folder's files on a branch, as its newest commit, whose id is returned."""
        files = {
            str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
        }
        commit = hashlib.sha1(repr((repo, branch, sorted(files.items()))).encode()).hexdigest()
        refs, commits = self.repos.setdefault(repo, ({}, {}))
        refs[branch], commits[commit] = commit, files
        return commit

    def gets(self, ending: str) -> list[str | None]:
        """The Range of each GET of a path that ends so."""
        return [
            part for method, path, part in self.asked if method == "GET" and path.endswith(ending)
        ]

    def close(self) -> None:
        """End it; silent answers end too."""
        self.over.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer as the hub does, or as the fault does."""
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        self.server.tokens[path] = self.headers.get("Authorization")
        with suppress(ConnectionError):
            if not self.server.fault(self, path):
                self.hub(path)

    def hub(self, path: str) -> None:
        """What the hub answers."""
        for repo, (refs, commits) in self.server.repos.items():
            commit_of = {**refs, **{commit: commit for commit in commits}}
            if path == f"/api/models/{repo}/refs":
                both = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                    for name, commit in refs.items()
                ]
                return self.say(json={"branches": both, "converts": [], "tags": []})
            for prefix in (f"/api/models/{repo}", f"/{repo}/resolve"):
                if path != prefix and not path.startswith(f"{prefix}/"):
                    continue
                if prefix.startswith("/api"):
                    revision, file = path[len(f"{prefix}/revision/") :] or "main", None
                else:
                    name = path[len(prefix) + 1 :]
                    revision = next((r for r in commit_of if name.startswith(f"{r}/")), "")
                    file = name[len(revision) + 1 :]
                if revision not in commit_of:
                    return self.say(404, {"X-Error-Code": "RevisionNotFound"})
                commit = commit_of[revision]
                if file is None:
                    siblings = [_listed(*item) for item in commits[commit].items()]
                    return self.say(json={"id": repo, "sha": commit, "siblings": siblings})
                if file not in commits[commit]:
                    headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
                    return self.say(404, headers)
                return self.file(commits[commit][file], commit, path)
        for _, commits in self.server.repos.values():
            for files in commits.values():
                for data in files.values():
                    if path == f"/lfs/{hashlib.sha256(data).hexdigest()}":
                        return self.part(data, {})
        # As the hub to those without a token: whether there is such a repository isn't told.
        return self.say(401, {"X-Error-Code": "RepoNotFound"})

    def file(self, data: bytes, commit: str, path: str) -> None:
        """A file's headers and bytes; a large one's are elsewhere."""
        headers = {"X-Repo-Commit": commit}
        if len(data) <= LARGE:
            return self.part(data, headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        tag = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-ETag": f'"{tag}"', "X-Linked-Size": str(len(data))}
        headers |= self.server.more
        return self.say(302, headers | {"Location": f"{self.server.store}/lfs/{tag}"})

    def part(self, data: bytes, headers: dict[str, str]) -> None:
        """A file's bytes, from the one on that the request asks for."""
        asked = self.headers.get("Range")
        if asked is None:
            return self.say(200, headers, data)
        start = int(asked.removeprefix("bytes=").split("-")[0])
        span = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.say(206, headers | {"Content-Range": span}, data[start:])

    def say(
        self,
        status: int = 200,
        headers: dict[str, str | None] | None = None,
        body: bytes = b"",
        *,
        json: object = None,
        cut: int | None = None,
    ) -> None:
        """An answer, without a header that is None; cut: it ends after so many bytes of its body."""
        if json is not None:
            body = _json(json)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def wait(self) -> bool:
        """Say nothing until the server ends."""
        self.server.over.wait(60)
        self.close_connection = True
        return True


def _listed(name: str, data: bytes) -> dict[str, object]:
    """A file in a repository's list."""
    if len(data) <= LARGE:
        return {"rfilename": name, "size": len(data)}
    large = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return {"rfilename": name, "size": len(data), "lfs": large}


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models--org--olmo"


@pytest.fixture
def hub(cache, monkeypatch):
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, name, 2.0)
    monkeypatch.setattr(hub_client, "WAITS", (0.01,))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield server
    server.close()


@pytest.fixture
def pushed(hub, checkpoint):
    hub.push(REPO, checkpoint)
    return checkpoint
