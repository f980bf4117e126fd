"""A small HTTP server that speaks the part of the Hub's protocol that downloading a model needs.

Model info (`/api/models/<id>/revision/<rev>`), the file tree, and `/<id>/resolve/<rev>/<path>` with ETag and
commit headers; files marked as LFS answer with a redirect to another path, as the Hub sends them to its CDN.
Range requests are honoured, faults can be injected, and every request is recorded. `hub_uploads` adds uploads.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repo:
    files: dict[str, bytes]
    lfs: set[str] = field(default_factory=set)
    commit: str = COMMIT
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    token: str | None = None  # None: public
    refuse: int = 0  # answer requests with this status
    refuse_only: str = ""  # only requests of this kind: "revision", "tree", "resolve" or "cdn"
    refuse_headers: dict[str, str] = field(default_factory=dict)
    refuse_first: int | None = None  # only so many requests; None: all
    cut_once: dict[str, int] = field(default_factory=dict)  # path -> bytes after which the line goes dead, once
    announce: dict[str, int] = field(default_factory=dict)  # path -> a wrong size to announce
    damage: dict[str, bytes] = field(default_factory=dict)  # path -> what is sent in place of its content


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, repos: dict[str, Repo], handler: type["Handler"] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.repos = repos
        self.requests: list[tuple[str, str, str | None]] = []  # (method, path, Range)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self, name: str) -> list[str | None]:
        """Range headers of the GET requests for the content of a file."""
        return [
            range_
            for method, path, range_ in self.requests
            if method == "GET" and path.endswith(f"/{name}") and not path.startswith("/api/")
        ]

    def handle_error(self, request: object, client_address: object) -> None:  # broken lines are on purpose
        return


@contextmanager
def serve(**repos: Repo) -> Iterator[HubServer]:
    """Serve `org__name=Repo(...)` as `org/name` until the block ends."""
    with running(HubServer({name.replace("__", "/"): repo for name, repo in repos.items()})) as server:
        yield server


Server = TypeVar("Server", bound=HubServer)


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Answer requests until the block ends."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            repo_id, verb, rest = (
                "/".join(parts[2:4]),
                parts[4] if len(parts) > 4 else "revision",
                parts[5:] or ["main"],
            )
        elif parts[0] == "cdn":
            repo_id, verb, rest = "/".join(parts[1:3]), "cdn", parts[3:]
        else:
            repo_id, verb, rest = "/".join(parts[0:2]), parts[2], parts[3:]
        repo = self.server.repos.get(repo_id)
        if repo is None:
            return self._error(404, "RepoNotFound")
        if repo.refuse and repo.refuse_first != 0 and verb.startswith(repo.refuse_only):
            repo.refuse_first = None if repo.refuse_first is None else repo.refuse_first - 1
            return self._error(repo.refuse, "", repo.refuse_headers)
        if verb != "cdn" and repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            return self._error(403 if repo.gated else 401, "GatedRepo" if repo.gated else "RepoNotFound")
        if verb == "cdn":
            name = "/".join(rest)
            return self._content(repo, name, {"Content-Disposition": f'inline; filename="{name}";'})
        if rest[0] not in (*repo.branches, repo.commit):
            return self._error(404, "RevisionNotFound")
        if verb == "revision":
            siblings = [{"rfilename": name} for name in repo.files]
            facts = {"sha": repo.commit, "private": repo.token is not None and not repo.gated, "siblings": siblings}
            return self._json({"id": repo_id, "modelId": repo_id, "tags": [], **facts})
        if verb == "tree":
            return self._json([_entry(repo, name) for name in repo.files])
        return self._resolve(repo_id, repo, "/".join(rest[1:]))

    def _resolve(self, repo_id: str, repo: Repo, name: str) -> None:
        if name not in repo.files:
            return self._error(404, "EntryNotFound")
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{etag(repo, name)}"'}
        if name not in repo.lfs:
            return self._content(repo, name, headers)
        size = repo.announce.get(name, len(repo.files[name]))
        headers |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{etag(repo, name)}"'}
        cdn = f"http://localhost:{self.server.server_port}/cdn"  # another host, as the client sees it
        headers |= {"Location": f"{cdn}/{repo_id}/{name}", "Content-Length": "0"}
        self._send(302, headers, b"")

    def _content(self, repo: Repo, name: str, headers: dict[str, str]) -> None:
        body, status = repo.damage.get(name, repo.files[name]), 200
        asked = self.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            body, status = body[start:], 206
        headers = {**headers, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}
        cut = repo.cut_once.pop(name, None) if self.command == "GET" else None
        self._send(status, headers, body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def _json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self._send(status, {"Content-Type": "application/json", "Content-Length": str(len(body))}, body)

    def _error(self, status: int, code: str, more: dict[str, str] | None = None) -> None:
        headers = {"Content-Length": "0"} | ({"X-Error-Code": code} if code else {}) | (more or {})
        self._send(status, headers, b"")

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def etag(repo: Repo, name: str) -> str:
    content = repo.files[name]
    if name in repo.lfs:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # what git calls the file


def _entry(repo: Repo, name: str) -> dict[str, object]:
    size = repo.announce.get(name, len(repo.files[name]))
    entry: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": etag(repo, name)}
    if name in repo.lfs:
        entry["lfs"] = {"oid": etag(repo, name), "size": size, "pointerSize": 134}
    return entry
