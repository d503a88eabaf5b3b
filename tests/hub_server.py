"""A Hub on 127.0.0.1 for tests: the calls of its API that creating, uploading to and downloading from a model repository take."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_local_write"
READ_TOKEN = "hf_local_read"
USER = "tester"


class HubServer:
    """`with HubServer() as hub:` serves until the block ends.

    Attributes:
        url: for HF_ENDPOINT. With it goes HF_HUB_DISABLE_XET=1: this Hub speaks LFS only.
        repositories: id -> {path: content}.
        requests: (method, path) of every call, in order.
        refuse: a regular expression of paths that are answered with status 500.
    """

    def __init__(self):
        self.repositories = {}
        self.objects = {}
        self.requests = []
        self.refuse = None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache, token: str | None = TOKEN) -> dict[str, str]:
        """The variables under which huggingface_hub talks to this Hub only."""
        variables = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
        return variables | ({} if token is None else {"HF_TOKEN": token})


def commit_id(files):
    """Forty hex digits that change when the files do."""
    return hashlib.sha1(repr(sorted((p, hashlib.sha1(c).digest()) for p, c in files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer("GET")

    do_HEAD = do_GET

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def _answer(self, method):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._chunks()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.refuse and re.search(self.hub.refuse, path):
            self._json({"error": "refused for the test"}, 500)
            return
        for route_method, pattern, handler in _ROUTES:
            if route_method == method and (match := re.fullmatch(pattern, path)):
                handler(self, *match.groups())
                return
        self._json({"error": f"no such call: {method} {path}"}, 404)

    def _chunks(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, body, status=200, headers=None):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status=200, headers=None):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _may_write(self, repo_id=None):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_TOKEN):
            self._json({"error": "Invalid username or password."}, 401)
        elif token == READ_TOKEN or (repo_id or USER).split("/")[0] != USER:
            self._json({"error": "You have read access but not the required permissions."}, 403)
        else:
            return True
        return False

    def create(self):
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        if not self._may_write(repo_id):
            return
        exists = repo_id in self.hub.repositories
        self.hub.repositories.setdefault(repo_id, {})
        self._json({"url": f"{self.hub.url}/{repo_id}"}, 409 if exists else 200)

    def may_write(self, repo_id):
        if self._may_write(repo_id):
            self._json({})

    def validate(self):
        content = json.loads(self.body)["content"]
        base_model = re.search(r"^base_model: *(.+)$", content, re.MULTILINE)
        if base_model and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model.group(1)):
            text = f'"base_model" with value "{base_model.group(1)}" is not valid. Use a model id from the Hub.'
            self._json({"errors": [{"message": text}], "error": text, "warnings": []}, 400)
            return
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo_id, _):
        if not self._may_write(repo_id):
            return
        files = [
            {"path": f["path"], "shouldIgnore": False, "uploadMode": "regular" if f["path"].endswith((".md", ".json")) else "lfs"}
            for f in json.loads(self.body)["files"]
        ]  # fmt: skip
        self._json({"files": files})

    def lfs_batch(self, repo_id):
        if not self._may_write(repo_id):
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify", "header": {}}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._json({"error": "the content is not what its name says"}, 400)
            return
        self.hub.objects[oid] = self.body
        self._json({})

    def lfs_verify(self):
        asked = json.loads(self.body)
        found = self.hub.objects.get(asked["oid"])
        self._json({}, 200 if found is not None and len(found) == asked["size"] else 404)

    def commit(self, repo_id, _):
        if not self._may_write(repo_id):
            return
        files = dict(self.hub.repositories[repo_id])
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.repositories[repo_id] = files
        sha = commit_id(files)
        self._json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None})

    def info(self, repo_id, _=None):
        files = self.hub.repositories.get(repo_id)
        if files is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": repo_id, "modelId": repo_id, "sha": commit_id(files), "private": False, "siblings": siblings})

    def tree(self, repo_id, _):
        files = self.hub.repositories.get(repo_id)
        if files is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        self._json(
            [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files.items()]
        )

    def resolve(self, repo_id, _, path):
        files = self.hub.repositories.get(repo_id)
        if files is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif path not in files:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            etag = hashlib.sha1(files[path]).hexdigest()
            self._send(files[path], headers={"ETag": f'"{etag}"', "X-Repo-Commit": commit_id(files)})


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", f"/api/models/{_ID}/auth-check/write", _Handler.may_write),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]+)", _Handler.lfs_put),
    ("POST", "/lfs-verify", _Handler.lfs_verify),
    ("POST", f"/api/models/{_ID}/commit/(.+)", _Handler.commit),
    ("GET", f"/api/models/{_ID}", _Handler.info),
    ("GET", f"/api/models/{_ID}/revision/(.+)", _Handler.info),
    ("GET", f"/api/models/{_ID}/tree/([^/]+)", _Handler.tree),
    ("GET", f"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
