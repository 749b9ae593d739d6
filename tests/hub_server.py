"""A hub of models on this machine: the few endpoints that huggingface_hub asks, and failures to order."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@dataclass
class Hub:
    """What is served and how, and what was asked: one line a request.

    Attributes:
        folders: the files of each repository, by its id.
        refusals: status and `X-Error-Code` of each repository that is not given.
        truncations: how many more times a file's body breaks off in the middle, by name.
        broken: names of files of which never more than the first half comes.
        stalled: names of files whose second half comes when `released` is set.
        status: that every request is answered with, in place of an answer.
        asked: the requests so far.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    truncations: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    stalled: set[str] = field(default_factory=set)
    released: threading.Event = field(default_factory=threading.Event)
    status: int | None = None
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urllib.parse.unquote(self.path.partition("?")[0]).strip("/").split("/")
        self.hub.asked.append(f"{self.command} {'/'.join(parts)} {self.headers.get('Range', '')}".strip())
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repository, kind, revision, rest = (
            "/".join(parts[:2]),
            *(*parts[2:4], "", "")[:2],
            "/".join(parts[4:]),
        )
        commit = COMMITS.get(revision or "main", revision)
        if self.hub.status is not None:
            return self._refuse(self.hub.status, "")
        if repository in self.hub.refusals:
            return self._refuse(*self.hub.refusals[repository])
        if repository not in self.hub.folders:
            return self._refuse(404, "RepoNotFound")
        if commit not in COMMITS.values():
            return self._refuse(404, "RevisionNotFound")
        folder = self.hub.folders[repository]
        if api and kind == "tree":
            return self._json([_entry(file, folder) for file in _files(folder)])
        if api:
            names = [{"rfilename": str(file.relative_to(folder))} for file in _files(folder)]
            return self._json({"id": repository, "sha": commit, "siblings": names})
        if kind == "resolve" and (folder / rest).is_file():
            return self._file(folder / rest, commit)
        return self._refuse(404, "EntryNotFound")

    def _file(self, path: Path, commit: str) -> None:
        content, start = path.read_bytes(), 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_sha1(path)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        left = self.hub.truncations.get(path.name, 0)
        end = len(content) // 2 if left or path.name in self.hub.broken else len(content)
        self.hub.truncations[path.name] = max(0, left - 1)
        if path.name in self.hub.stalled:
            self.wfile.write(content[start : start + (end - start) // 2])
            self.hub.asked.append(f"stalled {path.name}")
            self.hub.released.wait(300)
            start += (end - start) // 2
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[start:end])
        if end < len(content):
            self.close_connection = True

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at its `endpoint`, served from a thread."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _entry(file: Path, folder: Path) -> dict[str, object]:
    name, size = str(file.relative_to(folder)), file.stat().st_size
    return {"type": "file", "path": name, "size": size, "oid": _sha1(file)}


def _sha1(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
