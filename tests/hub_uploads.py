"""The part of the Hub's protocol that uploading needs, on top of the server of `hub_server`.

Accounts with tokens (`/api/whoami-v2`, `/api/<..>/auth-check/write`), creating repositories and branches, the check of
a card's metadata, and a commit as the client makes one over plain HTTP: it asks how each file is to be sent
(`preupload`), sends large ones to a storage on another host (LFS batch, PUT in one or several parts, verify), and then
names them all in one `commit`, a JSON object on each line. What arrives is stored, so it can be downloaded again.
Branches of a repository share their files. Xet is not spoken.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from hub_server import Handler, HubServer, Repo, etag, running


@dataclass
class Account:
    name: str
    role: str = "write"  # the token's: "read", "write" or "fineGrained"
    orgs: dict[str, str] = field(default_factory=dict)  # name -> role in it
    scoped: dict[str, str] = field(default_factory=dict)  # of a fine-grained token: name -> permission

    def may_write(self, repo_id: str) -> bool:
        owner = repo_id.partition("/")[0]
        if self.role == "fineGrained":
            return "repo.write" in (self.scoped.get(owner), self.scoped.get(repo_id))
        return self.role == "write" and (owner == self.name or self.orgs.get(owner) == "write")


class UploadServer(HubServer):
    def __init__(self, repos: dict[str, Repo], accounts: dict[str, Account], part_bytes: int | None) -> None:
        super().__init__(repos, _UploadHandler)
        self.accounts = accounts  # by token
        self.part_bytes = part_bytes  # larger files are sent in parts of this size; None: never
        self.storage: dict[str, bytes] = {}  # sha256 -> content
        self.parts: dict[str, dict[int, bytes]] = {}
        self.commits: list[dict[str, Any]] = []  # repo_id, revision, summary, and paths by what was done to them
        self.fail: dict[str, tuple[int, int]] = {}  # kind of request -> (status, how often)

    def sent(self, kind: str) -> int:
        """How many requests of a kind came in: a method and the end, or the middle, of a path."""
        method, _, part = kind.partition(" ")
        return sum(asked == method and part in path for asked, path, _ in self.requests)


@contextmanager
def serve_uploads(
    accounts: dict[str, Account], repos: dict[str, Repo] | None = None, *, part_bytes: int | None = None
) -> Iterator[UploadServer]:
    """Serve a Hub that these accounts (by their tokens) may write to, until the block ends."""
    with running(UploadServer(repos or {}, accounts, part_bytes)) as server:
        yield server


class _UploadHandler(Handler):
    server: UploadServer

    def do_GET(self) -> None:
        parts = self._parts()
        if parts[:2] == ["api", "whoami-v2"]:
            self._note()
            return self._fails("whoami") or self._whoami()
        if "auth-check" in parts:
            self._note()
            return self._fails("auth-check") or self._auth_check("/".join(parts[2:4]), parts[-1] == "write")
        return super().do_GET()

    def do_POST(self) -> None:
        self._note()
        body, parts = self._body(), self._parts()
        if parts[0] == "storage":
            return self._complete(parts[1], json.loads(body))
        if parts[2:4] == ["info", "lfs"]:
            repo_id, kind = (
                f"{parts[0]}/{parts[1].removesuffix('.git')}",
                "verify" if parts[-1] == "verify" else "batch",
            )
        elif parts[1] == "repos":
            asked = json.loads(body)
            repo_id, kind = f"{asked['organization']}/{asked['name']}", "create"
        elif parts[1] == "validate-yaml":
            repo_id, kind = "", "validate"
        else:
            repo_id, kind = "/".join(parts[2:4]), parts[4]
        if self._fails(kind):
            return None
        account = self._account()
        if account is None:
            return self._refuse(401, "Invalid username or password.")
        if kind == "validate":
            return self._validate(json.loads(body)["content"])
        if not account.may_write(repo_id):
            return self._refuse(403, f"You don't have the rights to write to {repo_id}")
        if kind == "create":
            return self._create(repo_id, asked)
        repo = self.server.repos.get(repo_id)
        if repo is None:
            return self._error(404, "RepoNotFound")
        if kind == "branch":
            repo.branches = (*repo.branches, parts[5])
            return self._json({})
        if kind in ("preupload", "commit") and parts[5] not in repo.branches:
            return self._error(404, "RevisionNotFound")
        answer = {"preupload": self._preupload, "batch": self._batch, "verify": self._verify}
        return self._commit(repo_id, parts[5], body) if kind == "commit" else answer[kind](repo_id, json.loads(body))

    def do_PUT(self) -> None:
        self._note()
        body, (_, oid, *number) = self._body(), self._parts()
        if self._fails("put"):
            return None
        if self.headers.get("Authorization"):
            return self._refuse(400, "the storage is not the Hub: no token belongs here")
        if number:
            self.server.parts.setdefault(oid, {})[int(number[0])] = body
        elif hashlib.sha256(body).hexdigest() != oid:
            return self._refuse(400, "the content is not what its name says")
        else:
            self.server.storage[oid] = body
        return self._send(200, {"ETag": f'"{len(body)}"', "Content-Length": "0"}, b"")

    def _whoami(self) -> None:
        account = self._account()
        if account is None:
            return self._refuse(401, "Invalid username or password.")
        token: dict[str, Any] = {"displayName": "test", "role": account.role}
        if account.role == "fineGrained":
            scoped = [
                {"entity": {"type": "model" if "/" in name else "user", "name": name}, "permissions": [permission]}
                for name, permission in account.scoped.items()
            ]
            token["fineGrained"] = {"global": ["discussion.write"], "scoped": scoped}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in account.orgs.items()]
        auth = {"type": "access_token", "accessToken": token}
        return self._json({"type": "user", "name": account.name, "orgs": orgs, "auth": auth})

    def _auth_check(self, repo_id: str, write: bool) -> None:
        account = self._account()
        if repo_id not in self.server.repos:
            return self._error(404, "RepoNotFound")
        if write and not (account and account.may_write(repo_id)):
            return self._refuse(403, f"You don't have the rights to write to {repo_id}")
        return self._json({})

    def _create(self, repo_id: str, asked: dict[str, Any]) -> None:
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repos:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        token = self._token() if asked.get("visibility") == "private" else None
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.server.repos[repo_id] = Repo({".gitattributes": attributes}, commit="0" * 40, token=token)
        return self._json({"url": url})

    def _validate(self, card: str) -> None:
        _, _, rest = card.partition("---\n")
        front, end, _ = rest.partition("\n---")
        try:
            known = isinstance(yaml.safe_load(front), dict) and bool(end)
            errors = [] if known else [{"message": "YAML Metadata Error: there is none"}]
        except yaml.YAMLError as error:
            errors = [{"message": f"YAML Metadata Error: {error}"}]
        return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, repo_id: str, asked: dict[str, Any]) -> None:
        repo, answers = self.server.repos[repo_id], []
        for file in asked["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            oid = etag(repo, file["path"]) if file["path"] in repo.files else None
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._json({"files": answers})

    def _batch(self, repo_id: str, asked: dict[str, Any]) -> None:
        host = f"http://localhost:{self.server.server_port}"  # another host, as the client sees it
        verify = {"href": f"{self.server.url}/{repo_id}.git/info/lfs/verify", "header": {}}
        answers = []
        for wanted in asked["objects"]:
            oid, size, step = wanted["oid"], wanted["size"], self.server.part_bytes
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.server.storage:
                upload: dict[str, Any] = {"href": f"{host}/storage/{oid}"}
                if step and size > step:
                    numbers = range(1, -(-size // step) + 1)
                    urls = {str(number): f"{host}/storage/{oid}/{number}" for number in numbers}
                    upload["header"] = {"chunk_size": str(step), **urls}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        return self._json({"objects": answers, "transfer": "multipart"})

    def _complete(self, oid: str, asked: dict[str, Any]) -> None:
        parts = self.server.parts.pop(oid, {})
        named = [(part["partNumber"], int(part["etag"].strip('"'))) for part in asked["parts"]]
        content = b"".join(parts[number] for number, _ in named)
        if named != [(n, len(parts[n])) for n in sorted(parts)] or hashlib.sha256(content).hexdigest() != oid:
            return self._refuse(400, "the parts are not what their name says")
        self.server.storage[oid] = content
        return self._json({})

    def _verify(self, repo_id: str, asked: dict[str, Any]) -> None:
        if len(self.server.storage.get(asked["oid"], b"")) != asked["size"]:
            return self._refuse(404, "nothing was stored under that name")
        return self._json({})

    def _commit(self, repo_id: str, revision: str, body: bytes) -> None:
        repo = self.server.repos[repo_id]
        files, lfs, done = dict(repo.files), set(repo.lfs), {"file": [], "lfsFile": [], "deletedFile": []}
        summary = ""
        for line in body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                summary = value["summary"]
                continue
            path = value["path"]
            done[kind].append(path)
            lfs.discard(path)
            if kind == "file":
                files[path] = base64.b64decode(value["content"])
            elif kind == "deletedFile":
                del files[path]
            elif value["oid"] in self.server.storage:
                files[path] = self.server.storage[value["oid"]]
                lfs.add(path)
            else:
                return self._refuse(400, f"{path} was never uploaded")
        repo.files, repo.lfs, repo.commit = files, lfs, hashlib.sha1(repo.commit.encode() + body).hexdigest()
        self.server.commits.append({"repo_id": repo_id, "revision": revision, "summary": summary, **done})
        url = f"{self.server.url}/{repo_id}/commit/{repo.commit}"
        return self._json({"success": True, "commitUrl": url, "commitOid": repo.commit})

    def _fails(self, kind: str) -> bool:
        """Answer with a failure if one was ordered for this kind of request."""
        status, times = self.server.fail.get(kind, (0, 0))
        if times:
            self.server.fail[kind] = (status, times - 1)
            self._refuse(status, "ordered by the test")
        return bool(times)

    def _refuse(self, status: int, why: str) -> None:
        body = json.dumps({"error": why}).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self._send(status, headers | ({"X-Error-Code": "RepoNotFound"} if status == 401 else {}), body)

    def _account(self) -> Account | None:
        return self.server.accounts.get(self._token())

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _parts(self) -> list[str]:
        return unquote(urlsplit(self.path).path).strip("/").split("/")

    def _note(self) -> None:
        self.server.requests.append((self.command, unquote(urlsplit(self.path).path), None))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)
