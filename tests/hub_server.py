"""A stand-in for the Hugging Face hub: the endpoints that its client uses for uploads and downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

CUT = "cut"


@dataclass
class Repository:
    """Branches of commits; a commit is the files it leaves."""

    private: bool
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})

    def files(self, revision: str) -> dict[str, bytes] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = [commit for branch in self.branches.values() for commit in branch]
        return next((commit for commit in commits if oid_of(commit) == revision), None)


@dataclass
class Fault:
    """What goes wrong with requests: a status, or the connection is cut while the body is on its way."""

    method: str
    path: str
    action: int | str
    times: int = 10**6
    headers: dict[str, str] = field(default_factory=dict)


def oid_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def standing_in(token: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Do what HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_DISABLE_XET do at start-up; the user is logged in."""
    server = HubServer(token)
    constants = "huggingface_hub.constants"
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", token)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.close()


class HubServer:
    """The server and all it knows; ``seen`` lists the requests as "METHOD path"."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, request) is not None for request in self.seen)

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create$", "create"),
        ("POST", r"/api/validate-yaml$", "validate"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)$", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)$", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)$", "branch"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch$", "batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)$", "put"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?$", "info"),
        ("HEAD|GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)$", "resolve"),
    )

    def log_message(self, *args: Any) -> None:
        """Keep the test's output clean."""

    def serve(self) -> None:
        self.hub.seen.append(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.fault(self.command, self.path)
        if fault is not None and fault.action == CUT:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.rfile.read(length)
        if fault is not None:
            self.answer(int(fault.action), {"error": "asked for by the test"}, fault.headers)
            return
        for method, pattern, name in self.ROUTES:
            match = re.match(pattern, self.path.partition("?")[0])
            if match and self.command in method.split("|"):
                self.route(name, match.groupdict())
                return
        self.answer(404, {"error": f"the stand-in has no {self.path}"})

    do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815

    def route(self, name: str, found: dict[str, str | None]) -> None:
        repository = self.hub.repositories.get(found.get("repo") or "")
        if self.command in ("POST",) and not self.known:
            self.answer(401, {"error": "Invalid username or password."})
        elif "repo" in found and (repository is None or (repository.private and not self.known)):
            self.answer(404 if self.known else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            getattr(self, name)(repository=repository, **found)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def create(self, repository: Repository | None) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        exists = name in self.hub.repositories
        if not exists:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.repositories[name] = Repository(private)
        self.answer(409 if exists else 200, {"url": f"{self.hub.url}/{name}", "error": "You already created it"})

    def validate(self, repository: Repository | None) -> None:
        text = json.loads(self.body)["content"]
        valid = re.match(r"---\n(.+?\n)---\n", text, re.DOTALL) is not None
        errors = [] if valid else [{"message": "no metadata"}]
        self.answer(200 if valid else 400, {"errors": errors, "warnings": [], "error": "Bad metadata"})

    def preupload(self, repository: Repository, repo: str, revision: str) -> None:
        there = repository.files(revision)
        if there is None:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        files = []
        for item in json.loads(self.body)["files"]:
            large = item["path"].endswith(".safetensors")
            content = there.get(item["path"])
            oid = None if content is None else hashlib.sha256(content).hexdigest() if large else git_oid(content)
            mode = "lfs" if large else "regular"
            files.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def batch(self, repository: Repository, repo: str) -> None:
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
            objects.append(item if item["oid"] in self.hub.blobs else {**item, **upload})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, repository: Repository | None, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.answer(400, {"error": "wrong content"})
            return
        self.hub.blobs[oid] = self.body
        self.answer(200)

    def commit(self, repository: Repository, repo: str, revision: str) -> None:
        files = dict(repository.branches[revision][-1])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        repository.branches[revision].append(files)
        oid = oid_of(files)
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        self.answer(200, {"commitUrl": url, "commitOid": oid, "pullRequestUrl": None})

    def branch(self, repository: Repository, repo: str, revision: str) -> None:
        exists = revision in repository.branches
        repository.branches.setdefault(revision, [repository.branches["main"][-1]])
        self.answer(409 if exists else 200, {"error": "Reference already exists"})

    def info(self, repository: Repository, repo: str, revision: str | None) -> None:
        files = repository.files(revision or "main")
        if files is None:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": name} for name in files]
        record = {"id": repo, "sha": oid_of(files), "private": repository.private, "siblings": siblings}
        self.answer(200, {**record, "tags": [], "downloads": 0, "likes": 0})

    def resolve(self, repository: Repository, repo: str, revision: str, path: str) -> None:
        files = repository.files(revision)
        if files is None:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif path not in files:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        else:
            etag = {"ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"', "X-Repo-Commit": oid_of(files)}
            self.answer(200, files[path], etag)
