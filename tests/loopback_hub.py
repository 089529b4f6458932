"""A small Hub on loopback: what the real client needs to create, fill and read a model repository.

It keeps commits in memory, serves files by branch or commit, and fails on request: see `Hub.fail`.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"


class Hub:
    """Use as a context manager; `endpoint` goes into HF_ENDPOINT.

    Attributes:
        account: what `whoami` answers to the owner of `TOKEN`.
        private: names of repositories that were created so.
        repos: name -> {branch: [commits]}; a commit is `{"id": ..., "message": ..., "files": {path: bytes}}`.
        blobs: SHA-256 -> bytes of what was uploaded by LFS, committed or not.
        requests: (method, path) of every request.
    """

    def __init__(self):
        self.account = {"name": "user", "orgs": [{"name": "guild", "roleInOrg": "write"}]}
        self.repos: dict[str, dict[str, list[dict]]] = {}
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.failures: list[tuple[str, str, int | str, int]] = []
        self.lock = threading.Lock()

    def fail(self, method: str, part: str, how: int | str, times: int = 1) -> None:
        """Answer the next `times` requests whose path contains `part` with status `how`, or cut them: "cut"."""
        self.failures.append((method, part, how, times))

    def failure_for(self, method: str, path: str):
        with self.lock:
            self.requests.append((method, path))
            for index, (own_method, part, how, times) in enumerate(self.failures):
                if own_method == method and part in path and times:
                    self.failures[index] = (own_method, part, how, times - 1)
                    return how
        return None

    def head(self, repo: str, revision: str = "main") -> dict | None:
        """The commit that a branch or an id names."""
        branches = self.repos.get(repo, {})
        if branches.get(revision):
            return branches[revision][-1]
        return next((c for commits in branches.values() for c in commits if c["id"] == revision), None)

    def commit(self, repo: str, branch: str, message: str, files: dict[str, bytes]) -> str:
        commits = self.repos[repo].setdefault(branch, [])
        identity = hashlib.sha1(f"{repo}{branch}{len(commits)}{message}".encode()).hexdigest()
        commits.append({"id": identity, "message": message, "files": files})
        return identity

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, content=None, headers=None, body: bytes | None = None):
        body = body if body is not None else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        split = urlsplit(self.path)
        self.route, self.query = unquote(split.path), parse_qs(split.query)
        how = self.hub.failure_for(self.command, self.route)
        length = int(self.headers.get("Content-Length") or 0)
        if how == "cut":
            self.rfile.read(min(length // 2, 1000))
            self.close_connection = True
            self.connection.close()
            return
        self.body = self._read(length)
        if how is not None:
            return self.answer(how, {"error": f"made to fail with {how}"}, {"X-Error-Message": f"fails with {how}"})
        needs_token = self.command == "POST" or self.route == "/api/whoami-v2"
        is_api = self.route.startswith("/api/") and self.route != "/api/validate-yaml"
        if is_api and needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        for part, own in self.ROUTES.items():
            if part in self.route:
                return own(self)
        return self.answer(404, {"error": self.route})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def _read(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def whoami(self):
        self.answer(200, {"type": "user", **self.hub.account})

    def create(self):
        asked = json.loads(self.body)
        name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        self.hub.repos[name] = {}
        self.hub.private |= {name} if asked.get("private") or asked.get("visibility") == "private" else set()
        self.hub.commit(name, "main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs"})
        self.answer(200, {"url": url, "name": name, "id": name})

    def validate(self):
        content = json.loads(self.body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _repo(self, part: str) -> tuple[str, str]:
        """Repository and revision of `/api/models/USER/NAME/<part>/REVISION`."""
        before, _, after = self.route.partition(f"/{part}/")
        return before.removeprefix("/api/models/").strip("/"), after.split("/")[0] or "main"

    def preupload(self):
        repo, revision = self._repo("preupload")
        commit = self.hub.head(repo, revision)
        if commit is None:
            return self.answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def lfs_batch(self):
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs-upload/{asked['oid']}", "header": {}}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self):
        oid = self.route.rsplit("/", 1)[-1]
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, {"error": "content and checksum differ"})
        self.hub.blobs[oid] = self.body
        self.answer(200)

    def add_commit(self):
        repo, branch = self._repo("commit")
        lines = [json.loads(line) for line in self.body.decode().splitlines() if line.strip()]
        head = self.hub.head(repo, branch)
        if head is None:
            return self.answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        files, message = dict(head["files"]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self.answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        identity = self.hub.commit(repo, branch, message, files)
        url = f"{self.hub.endpoint}/{repo}/commit/{identity}"
        self.answer(200, {"success": True, "commitOid": identity, "commitUrl": url, "hookOutput": ""})

    def branch(self):
        repo, name = self._repo("branch")
        if name in self.hub.repos[repo]:
            return self.answer(409, {"error": "Reference already exists"})
        self.hub.repos[repo][name] = list(self.hub.repos[repo]["main"])
        self.answer(200, {})

    def tree(self):
        repo, revision = self._repo("tree")
        commit = self.hub.head(repo, revision)
        if commit is None:
            return self.answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in commit["files"].items()
        ]
        self.answer(200, entries)

    def info(self):
        repo, _, revision = self.route.removeprefix("/api/models/").partition("/revision/")
        commit = self.hub.head(repo.strip("/"), revision or "main")
        if commit is None:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": path} for path in commit["files"]]
        facts = {"id": repo, "modelId": repo, "sha": commit["id"], "siblings": siblings, "tags": []}
        facts["private"] = repo.strip("/") in self.hub.private
        self.answer(200, facts)

    def resolve(self):
        repo, _, rest = self.route.strip("/").partition("/resolve/")
        revision, _, path = rest.partition("/")
        commit = self.hub.head(repo, revision)
        if commit is None:
            return self.answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        headers = {"X-Repo-Commit": commit["id"]}
        if path not in commit["files"]:
            return self.answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        content = commit["files"][path]
        first = 0
        if self.headers.get("Range"):
            first = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(206 if first else 200, headers=headers, body=content[first:])

    ROUTES = {
        "/api/whoami-v2": whoami,
        "/api/repos/create": create,
        "/api/validate-yaml": validate,
        "/preupload/": preupload,
        "/objects/batch": lfs_batch,
        "/lfs-upload/": lfs_upload,
        "/commit/": add_commit,
        "/branch/": branch,
        "/tree/": tree,
        "/resolve/": resolve,
        "/api/models/": info,
    }
