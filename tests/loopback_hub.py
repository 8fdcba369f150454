"""A stand-in for the Hugging Face Hub on this machine: real HTTP, model repositories in memory, no LFS and no Xet."""

import base64
import json
import re
import threading
from functools import cache
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from tempfile import TemporaryDirectory
from urllib.parse import parse_qs, unquote, urlsplit

import pytest


class Hub:
    def __init__(self):
        self.repositories = {}  # branches: commit by name; commits: files by commit
        self.unhandled = []
        self.address = ""
        self.scratch = TemporaryDirectory()
        self.home = f"{self.scratch.name}/home"

    def environment(self):
        """Let a process take this for the Hub; huggingface_hub reads it once, when imported."""
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        return switches | {"HF_ENDPOINT": self.address, "HF_TOKEN": "hf_any", "HF_HOME": self.home}

    def files(self, repo_id, revision="main"):
        return self.repositories[repo_id]["commits"][self.resolve(repo_id, revision)]

    def resolve(self, repo_id, revision):
        commit = self.repositories[repo_id]["branches"].get(revision, revision)
        return commit if commit in self.repositories[repo_id]["commits"] else None

    def create(self, repo_id, private):
        self.repositories[repo_id] = {"private": private, "branches": {}, "commits": {}}
        self.commit(repo_id, "main", {})

    def commit(self, repo_id, branch, files):
        repository = self.repositories[repo_id]
        oid = sha1(f"{repo_id}{len(repository['commits'])}".encode()).hexdigest()
        repository["commits"][oid] = repository["commits"].get(repository["branches"].get(branch), {}) | files
        repository["branches"][branch] = oid
        return oid


def describe(path, content):
    return {"type": "file", "path": path, "oid": sha1(content).hexdigest(), "size": len(content)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path in CONSTANT:
            return self.send(CONSTANT[path])
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, path):
                return method(self, body, *match.groups())
        return self.hub.unhandled.append(f"{self.command} {path}") or self.refuse(404, "NotFound")

    do_GET = do_POST = do_HEAD = answer

    def send(self, body, code=200, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code, name):
        self.send({"error": name}, code, X_Error_Code=name, X_Error_Message=name)

    def commit_of(self, repo_id, revision):
        if repo_id in self.hub.repositories:
            return self.hub.resolve(repo_id, revision or "main") or self.refuse(404, "RevisionNotFound")
        return self.refuse(404, "RepoNotFound")

    def create(self, body):
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        exists = repo_id in self.hub.repositories
        if not exists:
            self.hub.create(repo_id, asked.get("visibility") == "private" or asked.get("private", False))
        self.send({"url": f"{self.hub.address}/{repo_id}", "id": repo_id}, 409 if exists else 200)

    def create_branch(self, body, repo_id, branch):
        self.hub.commit(repo_id, branch, self.hub.files(repo_id))
        self.send({})

    def preupload(self, body, repo_id, revision):
        inline = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
        self.send({"files": [inline | {"path": file["path"]} for file in json.loads(body)["files"]]})

    def commit(self, body, repo_id, revision):
        operations = [json.loads(line) for line in body.splitlines() if line]
        added = [operation["value"] for operation in operations if operation["key"] == "file"]
        files = {file["path"]: base64.b64decode(file["content"]) for file in added}
        oid = self.hub.commit(repo_id, revision, files)
        self.send({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.address}/{repo_id}/commit/{oid}"})

    def info(self, body, repo_id, revision=None):
        if commit := self.commit_of(repo_id, revision):
            facts = {"id": repo_id, "sha": commit, "private": self.hub.repositories[repo_id]["private"], "tags": []}
            self.send(facts | {"siblings": [{"rfilename": path} for path in self.hub.files(repo_id, commit)]})

    def entries(self, body, repo_id, revision):
        if commit := self.commit_of(repo_id, revision):
            files = self.hub.files(repo_id, commit)
            named = parse_qs(body.decode()).get("paths", files)
            self.send([describe(path, files[path]) for path in named if path in files])

    def folder(self, body, repo_id, revision):
        """There are no folders, as a client sees who looks for optional files in one."""
        self.refuse(404, "EntryNotFound")

    def download(self, body, repo_id, revision, path):
        if commit := self.commit_of(repo_id, revision):
            if (content := self.hub.files(repo_id, commit).get(path)) is None:
                return self.refuse(404, "EntryNotFound")
            self.send(content, ETag=f'"{sha1(content).hexdigest()}"', X_Repo_Commit=commit)
        return None


CONSTANT = {
    "/api/whoami-v2": {"type": "user", "name": "tester", "orgs": [], "auth": {"accessToken": {"role": "write"}}},
    "/api/validate-yaml": {"errors": [], "warnings": []},
}
REPO = "([^/]+/[^/]+)"
ROUTES = [
    ("/api/repos/create", Handler.create),
    (f"/api/models/{REPO}/branch/(.+)", Handler.create_branch),
    (f"/api/models/{REPO}/preupload/(.+)", Handler.preupload),
    (f"/api/models/{REPO}/commit/(.+)", Handler.commit),
    (f"/api/models/{REPO}/tree/([^/]+)", Handler.entries),
    (f"/api/models/{REPO}/tree/([^/]+)/.+", Handler.folder),
    (f"/api/models/{REPO}/paths-info/([^/]+)", Handler.entries),
    (f"/api/models/{REPO}(?:/revision/(.+))?", Handler.info),
    (f"/{REPO}/resolve/([^/]+)/(.+)", Handler.download),
]


@cache
def start_hub():
    """Start the server; it ends with the tests."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return hub


@pytest.fixture(scope="module")
def loopback_hub():
    """An empty Hub for the tests of one file."""
    hub = start_hub()
    hub.repositories.clear()
    hub.unhandled.clear()
    yield hub
    assert hub.unhandled == []
