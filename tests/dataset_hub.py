"""A Hub on 127.0.0.1 for tests: the calls of its API that reading datasets takes."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


class DatasetHub:
    """`with DatasetHub({"user/name": {"data.csv": b"..."}}) as hub:` serves until the block ends.

    Attributes:
        url: for HF_ENDPOINT.
        datasets: id -> {path: content}.
        requests: the path of every call, in order.
    """

    def __init__(self, datasets: dict[str, dict[str, bytes]]):
        self.datasets = datasets
        self.requests = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache) -> dict[str, str]:
        """The variables under which huggingface_hub and datasets talk to this Hub only."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(path)
        for pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and match.group(1) in self.hub.datasets:
                answer(self, *match.groups())
                return
        self._json({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_POST = do_GET

    def _send(self, body, status=200, headers=None):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status=200, headers=None):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def info(self, name, _=None):
        files = [{"rfilename": path} for path in self.hub.datasets[name]]
        about = {"id": name, "sha": REVISION, "siblings": files, "private": False, "gated": False, "disabled": False}
        self._json(about | {"tags": [], "downloads": 0, "likes": 0, "cardData": {}})

    def tree(self, name, _, folder=""):
        below = folder.strip("/") + "/" if folder.strip("/") else ""
        files = [path for path in self.hub.datasets[name] if path.startswith(below)]
        folders = sorted({path[: path.index("/", len(below))] for path in files if "/" in path[len(below) :]})
        self._json([{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
            + [self._entry(name, path) for path in files if "/" not in path[len(below) :]])  # fmt: skip

    def paths_info(self, name, _):
        asked = (
            json.loads(self.body)["paths"]
            if self.body.startswith(b"{")
            else re.findall("paths=([^&]*)", unquote(self.body.decode()))
        )
        self._json([self._entry(name, path) for path in asked if path in self.hub.datasets[name]])

    def _entry(self, name, path):
        content = self.hub.datasets[name][path]
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def resolve(self, name, _, path):
        content = self.hub.datasets[name].get(path)
        if content is None:
            self._json({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": REVISION,
            "Accept-Ranges": "bytes",
        }
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted.group(1)), min(int(wanted.group(2) or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self._send(content[start : end + 1], 206, headers)
        else:
            self._send(content, 200, headers)


_ID = "([^/]+/[^/]+)"
_ROUTES = [
    (f"/api/datasets/{_ID}", _Handler.info),
    (f"/api/datasets/{_ID}/revision/(.+)", _Handler.info),
    (f"/api/datasets/{_ID}/tree/([^/]+)", _Handler.tree),
    (f"/api/datasets/{_ID}/tree/([^/]+)/(.*)", _Handler.tree),
    (f"/api/datasets/{_ID}/paths-info/([^/]+)", _Handler.paths_info),
    (f"/datasets/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
