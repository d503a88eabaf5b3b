"""`retrieve.py` among strangers: odd addresses, slow names, silent hosts, private networks, bombs, copies."""

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from retrieval_server import RetrievalServer, body, encode, picture

import retrieve
from custom_diffusion.class_folder import read_class_folder
from custom_diffusion.retrieval import addresses, collect
from custom_diffusion.retrieval.candidates import SourceError
from custom_diffusion.retrieval.class_image import FORMATS, Rejected, known_formats, to_class_image
from custom_diffusion.retrieval.download import Downloader
from custom_diffusion.retrieval.looks import Looks, look_of
from custom_diffusion.retrieval.sources.backend import KnnBackend

ROOT = Path(__file__).resolve().parent.parent
DEMO = [Image.open(path).convert("RGB") for path in sorted((ROOT / "demo/class_images").glob("*.png"))]


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(capsys, tmp_path):
    """Runs the command in-process on a table of addresses; (exit status, standard error, kept addresses)."""

    def run(urls, *flags):
        table = tmp_path / "rows.jsonl"
        table.write_text(
            "".join(json.dumps({"caption": f"a cat {n}", "url": url}) + "\n" for n, url in enumerate(urls))
        )
        argv = ["--class_prompt", "cat", "--class_data_dir", str(tmp_path / "class"), "--dataset", str(table)]
        status = retrieve.main([*argv, *map(str, flags)])
        err = capsys.readouterr().err
        assert "Traceback" not in err
        kept = tmp_path / "class" / "urls.txt"
        return status, err, kept.read_text().splitlines() if kept.exists() else []

    return run


@pytest.fixture
def loopback_2_is_public(monkeypatch):
    """127.0.0.2 stands for the open internet, where no test may go."""
    is_public = addresses.is_public
    for module in ("addresses", "client"):
        monkeypatch.setattr(
            f"custom_diffusion.retrieval.{module}.is_public",
            lambda address: address == "127.0.0.2" or is_public(address),
        )


def fetch(url, allow_private=False, rows_may_be_private=False, timeout=5):
    async def fetch_once():
        async with Downloader(timeout, allow_private, rows_may_be_private) as downloader:
            return await downloader.fetch(url)

    return asyncio.run(fetch_once())


def test_an_odd_address_costs_its_own_row_only(run):
    odd = [
        "http://127.0.0.1:99999/x",
        "http://127.0.0.1:0/x",
        "http://[::1/x",
        "http://x..y/",
        "http://%zz/",
        "http://é\u2028:80/",
    ]
    odd += ["http://" + "a" * 300 + ".test/x", "http://\x00/", "http://user:p@ss:word@/", "http://0127.0.0.1/x"]
    with RetrievalServer(faults={0: "to_bad_port", 1: "broken_header"}) as server:
        urls = [f"{server.url}/img/{n}" for n in range(8)]
        status, err, kept = run([*odd, *urls], "--num_class_images", 20)
    assert status == 1 and kept and set(kept) == set(urls[2:])
    assert "not an http(s) address" in err


def test_nothing_about_one_image_ends_a_run(run, monkeypatch):
    def break_on_some(encoded, min_size):
        if encoded == body(3, ""):
            raise RuntimeError("a decoder nobody has heard of")
        if encoded == body(4, ""):
            raise MemoryError
        return to_class_image(encoded, min_size)

    monkeypatch.setattr(collect, "to_class_image", break_on_some)
    with RetrievalServer() as server:
        urls = [f"{server.url}/img/{n}" for n in range(8)]
        status, err, kept = run(urls, "--num_class_images", 8)
    assert status == 1 and set(kept) == {url for n, url in enumerate(urls) if n not in (3, 4)}
    assert "1 failed (RuntimeError)" in err and "1 failed (MemoryError)" in err


def test_images_of_one_path_are_told_apart_and_of_one_content_are_not(tmp_path):
    with RetrievalServer() as server:
        server.rows = [
            {"id": n, "image_path": "image.jpg", "image": base64.b64encode(body(n % 4, "")).decode(), "similarity": 0.5}
            for n in range(5)
        ]
        argv = ["--class_prompt", "cat", "--class_data_dir", str(tmp_path), "--client_url", server.url]
        retrieve.main([*argv, "--num_class_images", "8"])
    assert len(read_class_folder(tmp_path)) == 4


def test_what_is_compressed_without_being_asked_for_is_not_inflated():
    """16 kB that would become 256 MB, in a process whose memory tells."""
    code = """if True:
        import asyncio, sys
        from custom_diffusion.retrieval.download import Downloader
        from custom_diffusion.retrieval.class_image import Rejected
        async def fetch():
            async with Downloader(20, True, True) as downloader:
                try:
                    await downloader.fetch(sys.argv[1])
                except Rejected as rejected:
                    print(rejected)
        asyncio.run(fetch())
        print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])"""
    with RetrievalServer(faults={1: "gzip_gzip"}) as server:
        done = subprocess.run(
            [sys.executable, "-c", code, f"{server.url}/img/1"], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    reason, peak = done.stdout.splitlines()
    assert reason == "compressed answer that was not asked for"
    assert int(peak) < 150_000


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA", "ICO", "PCX", "PDF"])
def test_formats_that_browsers_do_not_show_are_refused(kind):
    with pytest.raises(Rejected, match="not an image in a known format"):
        to_class_image(encode(picture(1, (256, 256)), kind), min_size=100)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_that_browsers_show_are_read(kind):
    if kind not in known_formats():
        pytest.skip("this Pillow does not read it")
    assert Image.open(BytesIO(to_class_image(encode(picture(1), kind), min_size=100)[0])).size == (400, 300)


def test_of_several_images_in_one_file_the_first_is_read():
    for kind in ("MPO", "GIF", "WEBP"):
        encoded = encode(picture(1), kind, save_all=True, append_images=[picture(2)])
        _, _, look = to_class_image(encoded, min_size=100)
        assert look.is_copy_of(look_of(picture(1)))


LARGEST = {  # the most pixels of each that are taken, in the mode that costs most
    "webp": ((4096, 3276), "RGBA", {"format": "WEBP", "lossless": True, "quality": 0, "method": 0}),
    "png": ((6000, 4066), "RGBA", {"format": "PNG", "compress_level": 1}),
    "palette": ((6000, 4066), "P", {"format": "PNG", "compress_level": 1}),
    "grey16": ((6000, 4066), "I;16", {"format": "PNG", "compress_level": 1}),
    "progressive": ((6000, 4066), "CMYK", {"format": "JPEG", "progressive": True, "subsampling": 0}),
    "jpeg": ((9500, 9400), "RGB", {"format": "JPEG"}),
}


@pytest.mark.parametrize("name", LARGEST)
def test_two_decoders_at_a_time_stay_below_500_megabytes(name, tmp_path):
    size, mode, options = LARGEST[name]
    Image.new(mode, size).save(tmp_path / "largest", **options)
    code = """if True:
        import sys, threading
        from pathlib import Path
        from custom_diffusion.retrieval import collect
        from custom_diffusion.retrieval.class_image import to_class_image
        encoded = Path(sys.argv[1]).read_bytes()
        threads = [threading.Thread(target=lambda: print(len(to_class_image(encoded, 256)[0]))) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])"""
    command = [sys.executable, "-c", code, str(tmp_path / "largest")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert len(done.stdout.splitlines()) == 3, done.stderr  # both were decoded
    assert int(done.stdout.splitlines()[2]) * 1024 < 500_000_000


@pytest.mark.parametrize("kind, size", [("PNG", (5000, 4900)), ("WEBP", (4100, 3300)), ("JPEG", (9500, 9500))])
def test_more_pixels_are_refused(kind, size):
    with pytest.raises(Rejected, match="more pixels than allowed"):
        to_class_image(encode(Image.new("L", size), kind), min_size=100)


SLOW_NAMES = """if True:
    import socket, sys, time
    look_up = socket.getaddrinfo
    def getaddrinfo(host, *args, **kwargs):
        if str(host).startswith("slow"):
            time.sleep(60)
        if str(host).endswith(".test"):
            host = "127.0.0.1"
        return look_up(host, *args, **kwargs)
    socket.getaddrinfo = getaddrinfo
"""


def start_with_slow_names(tmp_path, server, num_hosts, *flags):
    """The command with a resolver that takes a minute for 3 names of 10, the first rows included."""
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / "sitecustomize.py").write_text(SLOW_NAMES)
    rows = [
        {
            "caption": f"a cat {n}",
            "url": f"http://{'slow' if n % 10 < 3 else 'good'}-{n}.test:{server.server_address[1]}/img/{n}",
        }
        for n in range(num_hosts)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(ROOT / "retrieve.py"), "--class_prompt", "cat"]
    command += [
        "--class_data_dir",
        str(tmp_path / "class"),
        "--dataset",
        str(tmp_path / "rows.jsonl"),
        *map(str, flags),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "names"), str(ROOT)])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_slow_names_do_not_hold_up_the_others_nor_the_end(tmp_path):
    with RetrievalServer() as server:
        started = time.monotonic()
        process = start_with_slow_names(tmp_path, server, 200, "--num_class_images", 200, "--timeout", 8)
        _, err = process.communicate(timeout=100)
        took = time.monotonic() - started
    assert process.returncode == 1 and "60 host name not found" in err
    assert len(read_class_folder(tmp_path / "class")) == 140
    assert (
        took < 45
    )  # one timeout and the downloads, on a busy machine; one after another, the names alone take minutes


def test_ctrl_c_does_not_wait_for_names(tmp_path):
    with RetrievalServer() as server:
        process = start_with_slow_names(tmp_path, server, 100, "--num_class_images", 100, "--timeout", 50)
        while process.poll() is None and len(list((tmp_path / "class" / "images").glob("*.jpg"))) < 20:
            time.sleep(0.05)
        stopped = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert time.monotonic() - stopped < 15
    assert process.returncode == 130 and len(read_class_folder(tmp_path / "class")) >= 20


def test_a_silent_host_is_given_up_and_its_rows_take_no_place(run):
    asked = []
    with socket.create_server(("127.0.0.3", 0), backlog=200) as silent, RetrievalServer() as server:

        def accept():
            while True:
                try:
                    asked.append(silent.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        rows = [f"http://127.0.0.3:{silent.getsockname()[1]}/{n}" for n in range(100)]
        good = [f"{server.url}/img/{n}" for n in range(30)]
        started = time.monotonic()
        status, err, kept = run([*rows, *good], "--num_class_images", 40, "--num_workers", 8, "--timeout", 4)
        took = time.monotonic() - started
        silent.shutdown(socket.SHUT_RDWR)
    assert status == 1 and set(kept) == set(good)
    assert len(asked) <= 6 and "94 host that does not answer" in err and "6 too slow" in err
    assert took < 20  # one timeout; six rows at a time, each with its own, would be 68 s


PRIVATE = ["127.0.0.1", "localhost", "127.0.0.2", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0.0.0.0", "0x7f.1"]
PRIVATE += [
    "10.0.0.1",
    "192.168.1.1",
    "172.16.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "[fd00::1]",
    "[fe80::1]",
    "[64:ff9b::7f00:1]",
]


@pytest.mark.parametrize("host", PRIVATE)
def test_a_strangers_row_does_not_reach_private_networks(host):
    with RetrievalServer() as server, pytest.raises(Rejected, match="address on a private network"):
        fetch(f"http://{host}:{server.server_address[1]}/img/1")
    assert server.requests == []


@pytest.mark.parametrize("host", ["2130706433", "127.1", "0127.0.0.1", "127.000.000.001", "１２７.0.0.1"])
def test_other_spellings_of_private_addresses_lead_nowhere(host):
    with RetrievalServer() as server, pytest.raises(Rejected):
        fetch(f"http://{host}:{server.server_address[1]}/img/1")
    assert server.requests == []


@pytest.mark.parametrize("allowed", [{"allow_private": True}, {"rows_may_be_private": True}])
def test_what_the_user_named_is_reached(allowed):
    with RetrievalServer(faults={2: "redirect"}) as server:
        assert fetch(f"{server.url}/img/1", **allowed) == body(1, "")
        assert fetch(f"{server.url}/img/2", **allowed) == body(2, "")


def test_a_redirect_does_not_lead_from_the_internet_to_private_networks(loopback_2_is_public):
    with RetrievalServer() as inside, RetrievalServer(host="127.0.0.2", faults={1: "to_elsewhere"}) as outside:
        for name in ("127.0.0.1", "localhost"):
            outside.redirect_to = f"http://{name}:{inside.server_address[1]}/img/5"
            for rows_may_be_private in (False, True):
                with pytest.raises(Rejected, match="address on a private network"):
                    fetch(f"{outside.url}/img/1", rows_may_be_private=rows_may_be_private)
        assert inside.requests == [] and fetch(f"{outside.url}/img/2") == body(2, "")
        assert fetch(f"{outside.url}/img/1", allow_private=True) == body(5, "")


def test_a_second_answer_of_a_name_server_changes_nothing(loopback_2_is_public, monkeypatch):
    answers = iter(["127.0.0.2"])
    look_up = socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        return look_up(next(answers, "127.0.0.1") if host == "rebinds.test" else host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with RetrievalServer() as inside, RetrievalServer(inside.server_address[1], host="127.0.0.2") as outside:

        async def fetch_some():
            async with Downloader(5, False, False) as downloader:
                url = f"http://rebinds.test:{inside.server_address[1]}/img/"
                await downloader.look_up(url)
                return [await downloader.fetch(url + str(n)) for n in range(3)]

        assert asyncio.run(fetch_some()) == [body(n, "") for n in range(3)]
    assert inside.requests == [] and len(outside.requests) == 3


def test_a_proxy_is_asked_but_not_for_private_addresses(monkeypatch):
    asked = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body(1, ""))

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_address[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        assert fetch("http://images.invalid/1") == body(1, "")
        for host in ("10.0.0.1", "localhost"):
            with pytest.raises(Rejected, match="address on a private network"):
                fetch(f"http://{host}/1")
        proxy.shutdown()
    assert asked == ["http://images.invalid/1"]


def test_a_public_backend_does_not_lead_to_private_networks(loopback_2_is_public, tmp_path, capsys):
    with RetrievalServer() as inside, RetrievalServer(host="127.0.0.2", num_rows=4) as outside:
        outside.rows += [inside.row(n) for n in range(10, 14)]
        argv = ["--class_prompt", "cat", "--client_url", outside.url, "--num_class_images", "8"]
        assert retrieve.main([*argv, "--class_data_dir", str(tmp_path / "1")]) == 1
        assert "4 address on a private network" in capsys.readouterr().err and inside.requests == []
        assert retrieve.main([*argv, "--class_data_dir", str(tmp_path / "2"), "--allow_private"]) == 0
    assert (len(read_class_folder(tmp_path / "1")), len(read_class_folder(tmp_path / "2"))) == (4, 8)


def test_a_public_backend_cannot_redirect_questions_to_private_networks(loopback_2_is_public):
    with (
        RetrievalServer(num_rows=4) as inside,
        RetrievalServer(host="127.0.0.2", faults={1: "to_elsewhere"}) as outside,
    ):
        outside.redirect_to = f"{inside.url}/indices-list"
        backend = KnnBackend(f"{outside.url}/img/1", "local", 0.1, None)
        with pytest.raises(SourceError, match="address on a private network"):
            backend._request("GET", backend.url, 5, 1000)
    assert inside.requests == []


@pytest.mark.parametrize("answer", [b"[" * 100_000, b'[{"id": 1, "similarity": 1' + b"0" * 400 + b"}]", b"\xff\xfe[]"])
def test_an_odd_answer_of_a_backend_is_one_line(answer, capsys, tmp_path, monkeypatch):
    async def answers(self, *args):
        return 200, answer.decode("utf-8", errors="replace")

    with RetrievalServer(num_rows=4) as server:
        monkeypatch.setattr(KnnBackend, "_ask", answers)
        argv = ["--class_prompt", "cat", "--class_data_dir", str(tmp_path / "class"), "--client_url", server.url]
        assert retrieve.main([*argv, "--min_similarity", "0.2"]) == 1
    assert "Traceback" not in capsys.readouterr().err


COPIES = {
    "JPEG 75": lambda image: Image.open(BytesIO(encode(image, quality=75))),
    "JPEG 40": lambda image: Image.open(BytesIO(encode(image, quality=40))),
    "WebP": lambda image: Image.open(BytesIO(encode(image, "WEBP", quality=60))).convert("RGB"),
    "half": lambda image: image.resize((image.width // 2, image.height // 2)),
    "half, JPEG 60": lambda image: Image.open(
        BytesIO(encode(image.resize((image.width // 2, image.height // 2)), quality=60))
    ),
    "larger": lambda image: image.resize((image.width * 3 // 2, image.height * 3 // 2)),
}


@pytest.mark.parametrize("name", COPIES)
def test_recompressed_and_resized_copies_are_recognised(name):
    originals = [image.resize((512, 512), Image.Resampling.BICUBIC) for image in DEMO[:60]] + [
        picture(n) for n in range(60)
    ]
    missed = [n for n, image in enumerate(originals) if not look_of(COPIES[name](image)).is_copy_of(look_of(image))]
    assert len(missed) <= 1  # a disc on a plain ground may change at too many places


def on_white(image, side):
    canvas = Image.new("RGB", (400, 400), "white")
    canvas.paste(image.resize((side, side)), ((400 - side) // 2,) * 2)
    return canvas


def test_different_images_are_not_taken_for_copies():
    sets = [
        DEMO,
        [picture(n) for n in range(100)],
        [Image.new("RGB", (300, 300), (n, n, n)) for n in range(0, 250, 10)],
    ]
    # Things on white ground share their outline.
    sets += [[on_white(image, side) for image in DEMO[:80]] for side in (60, 120, 200, 280, 360)]
    for images in sets:
        seen = Looks()
        for image in images:
            look = look_of(image)
            assert not seen.has_copy_of(look)
            seen.add(look)


def test_copies_are_kept_once_in_one_run_and_in_the_next(run):
    with RetrievalServer(faults={1: "copy_smaller", 2: "copy_coarse"}) as server:
        urls = [f"{server.url}/img/{n}" for n in range(5)]
        assert run(urls[:1], "--num_class_images", 1)[2] == urls[:1]
        status, err, kept = run(urls, "--num_class_images", 5)
    assert status == 1 and "2 near-duplicate" in err and set(kept) == {urls[0], urls[3], urls[4]}


@pytest.mark.slow
def test_twenty_kills_at_random_leave_every_line_with_its_image(tmp_path):
    import random

    chance = random.Random(7)
    folder = tmp_path / "class"
    command = [sys.executable, str(ROOT / "retrieve.py"), "--class_prompt", "cat", "--class_data_dir", str(folder)]
    with RetrievalServer(num_rows=900, latency=0.01) as server:
        command += ["--client_url", server.url, "--num_class_images", "600"]
        seen = 0
        for _ in range(20):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            more = chance.randrange(1, 25)
            while process.poll() is None and len(list(folder.glob("images/*.jpg"))) < seen + more:
                time.sleep(0.001)
            time.sleep(chance.random() * 0.05)
            process.kill()
            process.wait()
            rows = read_class_folder(folder)
            assert len(rows) >= len(list(folder.glob("images/*.jpg"))) - 1 >= seen
            seen = len(rows)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    lines = [(folder / name).read_text().splitlines() for name in ("images.txt", "caption.txt", "urls.txt")]
    assert [len(column) for column in lines] == [600] * 3 and len(list((folder / "images").iterdir())) == 600
    for path, caption, url in zip(*lines):
        number = int(url.rsplit("/", 1)[1])
        assert caption == f"a cat, number {number}"
        with Image.open(folder / path) as kept:
            assert look_of(kept.convert("RGB")).is_copy_of(look_of(picture(number)))
