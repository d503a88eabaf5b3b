"""A local server of the clip-retrieval protocol and of pictures, with every fault seen in the wild.

Tests start `RetrievalServer` in-process; `python tests/retrieval_server.py PORT FAULTS.json` serves the pictures only, for
runs against a real backend. Picture n is at /img/n; `faults` says what is wrong with it.
"""

import gzip
import hashlib
import json
import sys
import threading
import time
import zlib
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw

# Answers that hold a usable picture all the same ...
GOOD = ("gif", "webp", "cmyk", "png16", "rgba", "exif", "redirect")
# ... and those that do not.
BAD = (
    "404", "403", "410", "500", "html", "empty", "cut", "short", "hang", "drip", "drip_header", "huge", "huge_chunked",
    "bomb", "loop", "to_file", "same_bytes", "same_pixels", "small",
    "to_bad_port", "gzip_gzip", "eps", "copy_smaller", "copy_coarse", "broken_header",
)  # fmt: skip


@cache
def picture(n: int, size: tuple[int, int] = (400, 300)) -> Image.Image:
    """A picture like no other: its colours come from a hash of n."""
    colours = hashlib.sha512(str(n).encode()).digest()
    small = Image.frombytes("RGB", (7, 3), colours[:63])
    image = small.resize(size, Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).text((20, 20), f"picture {n}")
    return image


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in 50 kB."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (20000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(2501 * 20000)))
        + chunk(b"IEND", b"")
    )


@cache
def body(n: int, fault: str) -> bytes:
    """The file served for picture n."""
    image = picture(n)
    if fault == "gif":
        return encode(image.convert("P"), "GIF", save_all=True, append_images=[picture(n + 1).convert("P")])
    if fault == "webp":
        return encode(image, "WEBP")
    if fault == "cmyk":
        return encode(image.convert("CMYK"))
    if fault == "png16":
        return encode(image.convert("L").convert("I").point(lambda value: value * 257).convert("I;16"), "PNG")
    if fault == "rgba":
        image = image.convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        return encode(image, "PNG")
    if fault == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        return encode(image, exif=exif)
    if fault == "small":
        return encode(picture(n, (200, 150)))
    if fault == "bomb":
        return bomb()
    if fault == "same_bytes":
        return body(0, "")
    if fault == "same_pixels":
        return encode(Image.open(BytesIO(body(0, ""))), "PNG")
    if fault == "copy_smaller":
        return encode(picture(0, (360, 270)), "WEBP", quality=70)
    if fault == "copy_coarse":
        return encode(Image.open(BytesIO(body(0, ""))), quality=40)
    if fault == "eps":
        return encode(image, "EPS")
    if fault == "gzip_gzip":
        return gzip.compress(gzip.compress(bytes(2**28)))
    if fault == "short":
        return encode(image)[:-2000]
    return encode(image)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status, content, kind="image/jpeg", length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def send_json(self, status, value):
        self.send(status, json.dumps(value).encode(), "application/json")

    def do_GET(self):
        if self.path == "/indices-list":
            self.server.note(self.path)
            if self.server.mode in ("html", "500"):
                return self.send(404, b"<html>not found</html>", "text/html")
            return self.send_json(200, self.server.indices)
        if not self.path.startswith("/img/"):
            return self.send(404, b"<html>not found</html>", "text/html")
        number, _, rest = self.path.removeprefix("/img/").partition("?")
        n = int(number)
        self.server.note(self.path)
        time.sleep(self.server.latency)
        fault = "" if rest == "redirected" else self.server.faults.get(n, "")
        try:
            getattr(self, "serve_" + fault, self.serve)(n, fault)
        except OSError:  # the client has gone, as it should for some faults
            self.close_connection = True

    def serve(self, n, fault):
        if fault.isdigit():
            return self.send(int(fault), b"no", "text/plain")
        return self.send(200, body(n, fault))

    def serve_html(self, n, fault):
        self.send(200, b"<!doctype html><title>sold</title>" + b"x" * 5000, "text/html")

    def serve_empty(self, n, fault):
        self.send(200, b"")

    def serve_cut(self, n, fault):
        content = body(n, "")
        self.close_connection = True
        self.send(200, content[: len(content) // 2], length=len(content))

    def serve_hang(self, n, fault):
        self.close_connection = True
        self.server.stopping.wait(self.server.hang)

    def serve_drip(self, n, fault):
        content = body(n, "")
        self.send(200, content[:-60], length=len(content))
        for byte in content[-60:]:
            if self.server.stopping.wait(self.server.hang / 10):
                break
            self.wfile.write(bytes([byte]))

    def serve_drip_header(self, n, fault):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for i in range(60):
            if self.server.stopping.wait(self.server.hang / 10):
                break
            self.wfile.write(b"X-%d: 1\r\n" % i)
        self.close_connection = True

    def serve_huge(self, n, fault):
        self.send(200, body(n, "") + bytes(60_000_000))

    def serve_huge_chunked(self, n, fault):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for block in [body(n, ""), *[bytes(1_000_000)] * 60]:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
        self.wfile.write(b"0\r\n\r\n")

    def serve_redirect(self, n, fault):
        self.send(302, b"", Location=f"/img/{n}?redirected")

    def serve_loop(self, n, fault):
        self.send(302, b"", Location=self.path)

    def serve_to_file(self, n, fault):
        self.send(302, b"", Location="file:///etc/hostname")

    def serve_to_bad_port(self, n, fault):
        self.send(302, b"", Location="http://127.0.0.1:99999/x")

    def serve_to_elsewhere(self, n, fault):
        self.send(302, b"", Location=self.server.redirect_to)

    def serve_gzip_gzip(self, n, fault):
        self.send(200, body(n, fault), **{"Content-Encoding": "gzip, gzip"})

    def serve_broken_header(self, n, fault):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nContent-Length: x\r\n\r\n")
        self.close_connection = True

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.note(self.path)
        if self.path != "/knn-service":
            return self.send(405, b"<html>method not allowed</html>", "text/html")
        if self.server.mode == "html":
            return self.send(200, b"<!doctype html>\n<title>This domain is for sale</title>", "text/html")
        try:
            query = json.loads(content)
        except ValueError:
            return self.send_json(
                400, {"message": "The browser (or proxy) sent a request that this server could not understand."}
            )
        num_images = query.get("num_images")
        if (
            self.server.mode == "500" or query.get("indice_name") not in self.server.indices or not query.get("text")
            or not isinstance(num_images, int) or num_images < 1
        ):  # fmt: skip
            return self.send_json(500, {"message": "Internal Server Error"})
        rows = [row for i, row in enumerate(self.server.rows[:num_images]) if i not in self.server.near_duplicates]
        return self.send_json(200, rows)


class RetrievalServer(ThreadingHTTPServer):
    """Serves on 127.0.0.1, or another loopback address, while used as a context manager.

    Attributes:
        redirect_to: where "to_elsewhere" leads.
        faults: picture number -> what is wrong with it, one of GOOD or BAD.
        rows: what `/knn-service` finds, best first; `near_duplicates` are row numbers left out after the search.
        mode: "", or "html" or "500" for a backend that answers only that.
        latency, hang: seconds before each answer; of a hanging one.
        requests: every path asked for, in order.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port=0, faults=None, num_rows=0, latency=0.0, hang=5.0, host="127.0.0.1"):
        super().__init__((host, port), Handler)
        self.url = f"http://{host}:{self.server_address[1]}"
        self.faults = faults or {}
        self.rows = [self.row(n) for n in range(num_rows)]
        self.near_duplicates = set()
        self.indices = ["laion_400m", "local"]
        self.mode, self.latency, self.hang = "", latency, hang
        self.redirect_to = ""
        self.requests, self.stopping, self._noting = [], threading.Event(), threading.Lock()

    def row(self, n, **fields):
        return {
            "url": f"{self.url}/img/{n}",
            "caption": f"a cat, number {n}",
            "id": n,
            "similarity": 0.9 - n / 1000,
        } | fields

    def note(self, path):
        with self._noting:
            self.requests.append(path)

    def handle_error(self, request, client_address):
        pass  # a client that hung up

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def settled(self) -> int:
        """How many requests there were, once no more come: what a run asked for too much may arrive after its end."""
        count = -1
        while count != len(self.requests):
            count = len(self.requests)
            time.sleep(0.5)
        return count

    def __exit__(self, *exception):
        self.stopping.set()
        self.shutdown()
        self.server_close()


if __name__ == "__main__":
    port, faults = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()) if sys.argv[2:] else {}
    with RetrievalServer(port, {int(n): fault for n, fault in faults.items()}, latency=0.1) as server:
        print(server.url, flush=True)
        threading.Event().wait()
