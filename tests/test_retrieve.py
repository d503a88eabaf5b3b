"""`retrieve.py` against a local server of the clip-retrieval protocol and faulty pictures."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from retrieval_server import BAD, GOOD, RetrievalServer, body, encode, picture

import retrieve
from custom_diffusion.class_folder import read_class_folder
from custom_diffusion.retrieval import hub
from custom_diffusion.retrieval.candidates import SourceError
from custom_diffusion.retrieval.sources import backend
from custom_diffusion.retrieval.sources.backend import KnnBackend

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(capsys, tmp_path):
    """Runs the command in-process; (exit status, standard output, standard error without the progress bar)."""

    def run(*flags, class_prompt="cat", folder=None):
        argv = [*map(str, flags)]
        if class_prompt is not None:
            argv += ["--class_prompt", class_prompt, "--class_data_dir", str(folder or tmp_path / "class")]
        try:
            status = retrieve.main(argv)
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return (
            status,
            out,
            "\n".join(line for line in re.split(r"[\r\n]+", err) if "image/s" not in line and line.strip()),
        )

    return run


def lists(folder):
    return [
        (folder / name).read_text(encoding="utf-8").splitlines() for name in ("images.txt", "caption.txt", "urls.txt")
    ]


def assert_whole(folder, count, caption="a cat, number {n}"):
    """Every list has `count` lines, line i of each is about one picture, and every picture is a JPEG of its own."""
    paths, captions, urls = lists(folder)
    assert len(paths) == len(captions) == len(urls) == count
    assert len(set(paths)) == len(set(urls)) == count
    pixels = set()
    for path, text, url in zip(paths, captions, urls):
        assert re.fullmatch(r"images/\d+\.jpg", path)
        with Image.open(folder / path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            pixels.add(image.tobytes())
        assert text == caption.format(n=url.rsplit("/", 1)[1])
    assert len(pixels) == count
    assert read_class_folder(folder) == [(folder / path, text) for path, text in zip(paths, captions)]
    assert not list((folder / ".retrieve").glob("part*"))


def test_every_fault_is_passed_over_and_every_format_taken(run, tmp_path):
    kinds = [*BAD, *GOOD]
    faults = dict(enumerate(kinds, start=1))
    num_rows = len(kinds) + 8
    with RetrievalServer(faults=faults, num_rows=num_rows, hang=30) as server:
        wanted = num_rows - len(BAD)
        status, _, err = run(
            "--client_url", server.url, "--num_class_images", wanted + 1, "--timeout", 5, "--min_size", 220
        )
    assert status == 1
    assert f"{wanted} of {wanted + 1} images" in err
    assert_whole(tmp_path / "class", wanted)
    kept = {int(url.rsplit("/", 1)[1]) for url in lists(tmp_path / "class")[2]}
    assert kept == {n for n in range(num_rows) if faults.get(n) not in BAD}
    paths, _, urls = lists(tmp_path / "class")
    for path, url in zip(paths, urls):
        turned = faults.get(int(url.rsplit("/", 1)[1])) == "exif"
        assert Image.open(tmp_path / "class" / path).size == ((300, 400) if turned else (400, 300))


def test_enough_images_are_left_alone(run, tmp_path):
    with RetrievalServer(num_rows=20) as server:
        assert run("--client_url", server.url, "--num_class_images", 8)[0] == 0
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "class").rglob("*")}
        asked = server.settled()
        status, out, _ = run("--client_url", server.url, "--num_class_images", 8)
        assert status == 0 and "nothing to do" in out
        assert len(server.requests) == asked
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "class").rglob("*")}


def test_more_images_later_ask_for_the_missing_ones_only(run, tmp_path):
    with RetrievalServer(faults={3: "404", 4: "same_bytes"}, num_rows=40) as server:
        assert run("--client_url", server.url, "--num_class_images", 10)[0] == 0
        first = set(lists(tmp_path / "class")[2]) | {f"{server.url}/img/3", f"{server.url}/img/4"}
        server.requests.clear()
        status, _, err = run("--client_url", server.url, "--num_class_images", 25)
        assert status == 0, err
        assert not first & {server.url + path for path in server.requests}
    assert_whole(tmp_path / "class", 25)


def test_captions_and_urls_are_single_lines_whatever_comes(run, tmp_path):
    odd = [None, float("nan"), "", "  ", "two\nlines\r\n\tand\x0bmore\u2028still\x85one", 7, ["x"], "emoji \ud83d cut"]
    with RetrievalServer() as server:
        server.rows = [server.row(n, caption=caption) for n, caption in enumerate(odd)]
        server.rows += [
            server.row(n, url=url) for n, url in enumerate((None, float("nan"), "", "ftp://x/y", "/etc/passwd"), 50)
        ]
        server.rows += [{"id": 99, "similarity": 0.1}, {"id": 98, "similarity": 0.1, "url": f"{server.url}/img/98"}]
        status, _, err = run("--client_url", server.url, "--num_class_images", 20)
    assert status == 1 and "9 of 20" in err
    paths, captions, urls = lists(tmp_path / "class")
    assert len(paths) == len(captions) == len(urls) == 9
    by_number = {int(url.rsplit("/", 1)[1]): caption for url, caption in zip(urls, captions)}
    assert by_number == {
        0: "cat", 1: "cat", 2: "cat", 3: "cat", 4: "two lines and more still one", 5: "cat", 6: "cat", 7: "emoji ? cut", 98: "cat",
    }  # fmt: skip


def test_a_short_answer_does_not_mean_an_exhausted_index(run, tmp_path):
    with RetrievalServer(num_rows=60) as server:
        server.near_duplicates = set(range(2, 28))
        assert run("--client_url", server.url, "--num_class_images", 20)[0] == 0
        assert server.requests.count("/knn-service") > 1
    assert_whole(tmp_path / "class", 20)


def test_rows_below_min_similarity_are_not_taken(run, tmp_path):
    with RetrievalServer(num_rows=60) as server:
        status, _, err = run("--client_url", server.url, "--num_class_images", 20, "--min_similarity", 0.8895)
    assert status == 1 and "--min_similarity below 0.8895" in err
    assert_whole(tmp_path / "class", 11)


def test_pictures_on_the_backends_disk_come_with_the_row(run, tmp_path):
    import base64

    with RetrievalServer() as server:
        server.rows = [
            {
                "id": n,
                "image_path": f"/data/{n}.jpg",
                "image": base64.b64encode(body(n, "")).decode(),
                "similarity": 0.5,
            }
            for n in range(5)
        ]
        assert run("--client_url", server.url, "--num_class_images", 5)[0] == 0
    assert lists(tmp_path / "class")[2] == [f"/data/{n}.jpg" for n in range(5)]


@pytest.mark.parametrize(
    "mode, flags, said",
    [
        ("html", [], "not JSON but starts '<!doctype html>"),
        ("500", [], "answered 500"),
        ("", ["--indice_name", "laion5B"], "no index 'laion5B'; it has: laion_400m, local"),
        ("dead", [], "cannot reach the clip-retrieval backend"),
        ("wrong path", [], "--client_url must be the address of the service"),
    ],
)
def test_a_backend_that_fails_is_explained_in_one_line(run, tmp_path, mode, flags, said):
    with RetrievalServer(num_rows=5) as server:
        server.mode = mode
        url = {"dead": "http://127.0.0.1:9", "wrong path": server.url + "/api"}.get(mode, server.url)
        status, _, err = run("--client_url", url, *flags)
    assert status == 1
    (line,) = (line for line in err.splitlines() if line.startswith("retrieve.py: "))
    assert said in line
    assert not (tmp_path / "class" / "images.txt").exists()


def test_without_any_source_the_command_says_what_works(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "retrieve.py"),
        "--class_prompt",
        "cat",
        "--class_data_dir",
        str(tmp_path / "c"),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "CLIP_RETRIEVAL_URL"} | {
        # Whatever network there is, neither source is behind this proxy.
        "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HF_ENDPOINT": "https://hub.invalid",
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    # The promise is 15 seconds; wall clock on a busy machine says little, so what may be waited for is added up.
    assert backend.CONNECT_SECONDS + hub.HUB_SECONDS <= 12
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "gone since early 2024" in done.stderr
    commands = re.findall(r"^  python retrieve.py (.*)$", done.stderr, re.M)
    assert ["--dataset" in c for c in commands] == [True, False] and ["--client_url" in c for c in commands] == [
        False,
        True,
    ]
    for line in commands:
        assert retrieve.parse_args(line.split()).class_prompt == "cat"
    assert not (tmp_path / "c").exists()


def test_a_silent_server_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(backend, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(SourceError, match="no answer within"):
        KnnBackend(f"http://127.0.0.1:{silent.getsockname()[1]}", "local", 0.1, None).check()


def test_the_environment_names_the_backend(run, monkeypatch, tmp_path):
    with RetrievalServer(num_rows=8) as server:
        monkeypatch.setenv("CLIP_RETRIEVAL_URL", server.url + "/knn-service")
        status, out, _ = run("--num_class_images", 4)
    assert status == 0 and f"Using clip-retrieval backend {server.url}/knn-service (index laion_400m)" in out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--num_class_images", "0"], "--num_class_images"),
        (["--timeout", "nan"], "--timeout"),
        (["--aesthetic_weight", "2"], "--aesthetic_weight"),
        (["--client_url", "localhost:1234"], "--client_url"),
        (["--split", "train"], "--split"),
        (["--class_prompt", "!?"], "--class_prompt"),
        (["--concepts_list", "x.json"], "--concepts_list"),
    ],
)
def test_a_bad_flag_is_named(flags, said, run):
    status, _, err = run("--class_prompt", "cat", "--class_data_dir", "x", *flags, class_prompt=None)
    assert status == 2 and f"error: {said}" in err


def test_help_and_flag_errors_come_at_once():
    code = "import sys, retrieve\ntry: retrieve.main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "retrieve" in loaded and not {"datasets", "PIL", "httpx", "torch", "numpy"} & set(loaded)


def test_every_concept_of_a_list(run, tmp_path):
    concepts = [
        {
            "instance_prompt": f"a <new> {p}",
            "class_prompt": p,
            "instance_data_dir": "x",
            "class_data_dir": str(tmp_path / p),
        }
        for p in ("cat", "wooden pot")
    ]
    path = tmp_path / "concept_list.json"
    path.write_text(json.dumps(concepts))
    with RetrievalServer(num_rows=12) as server:
        assert (
            run("--concepts_list", path, "--client_url", server.url, "--num_class_images", 6, class_prompt=None)[0] == 0
        )
    assert_whole(tmp_path / "cat", 6)
    assert_whole(tmp_path / "wooden pot", 6)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[", "not valid JSON"),
        ("{}", "a list of concepts"),
        ('[{"class_prompt": "cat"}]', "concept 1 at line 1: 'class_data_dir' is missing"),
        (
            '[{"class_prompt": "cat", "class_data_dir": "a"}, {"class_prompt": "dog", "class_data_dir": "a"}]',
            "another class",
        ),
    ],
)
def test_a_bad_concepts_list_is_named(run, tmp_path, text, said):
    path = tmp_path / "list.json"
    path.write_text(text)
    status, _, err = run("--concepts_list", path, class_prompt=None)
    assert status == 2 and said in err and str(path) in err


def test_a_concepts_list_with_a_byte_order_mark_is_read_as_in_training(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('\ufeff[{"class_prompt": "cat", "class_data_dir": "a"}]', encoding="utf-8")
    args = retrieve.parse_args(["--concepts_list", str(path)])
    assert retrieve.read_classes(args) == [("cat", Path("a"))]


def test_at_most_a_few_requests_a_host_at_a_time(run):
    with RetrievalServer(num_rows=40) as server:
        now, most = Counter(), Counter()

        def slow(serve):
            def wrapped(self):
                with server._noting:
                    now["open"] += 1
                    most["open"] = max(most["open"], now["open"])
                time.sleep(0.03)
                with server._noting:
                    now["open"] -= 1
                serve(self)

            return wrapped

        handler = type("Counting", (server.RequestHandlerClass,), {"do_GET": slow(server.RequestHandlerClass.do_GET)})
        server.RequestHandlerClass = handler
        assert run("--client_url", server.url, "--num_class_images", 30)[0] == 0
    assert 2 <= most["open"] <= 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_at_any_moment_and_started_again(tmp_path, number):
    folder = tmp_path / "class"
    command = [sys.executable, str(ROOT / "retrieve.py"), "--class_prompt", "cat", "--class_data_dir", str(folder)]
    with RetrievalServer(num_rows=80, faults={5: "hang"}, latency=0.02) as server:
        command += ["--client_url", server.url, "--num_class_images", "50"]
        for at in (10, 30):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            while process.poll() is None and len(list(folder.glob("images/*.jpg"))) < at:
                time.sleep(0.001)
            process.send_signal(number)
            _, err = process.communicate(timeout=20)
            assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
            assert "Traceback" not in err
            kept = read_class_folder(folder)  # aligned at every moment, before anything is mended
            assert len(kept) >= at - 1
            if number != signal.SIGKILL:  # then also for readers that know nothing of the staged lists
                assert {len(column) for column in lists(folder)} == {len(list((folder / "images").iterdir()))}
            for path, _ in kept:
                Image.open(path).load()
            before = set(lists(folder)[2]) if not (folder / ".retrieve" / "lists").exists() else set()
            server.requests.clear()
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not before & {server.url + path for path in server.requests}
    assert_whole(folder, 50)
    assert len(list((folder / "images").iterdir())) == 50


def test_two_processes_do_not_fill_one_folder(run, tmp_path):
    from custom_diffusion.retrieval.writer import ClassFolder

    other = ClassFolder(tmp_path / "class", 256)
    other.open()
    with RetrievalServer(num_rows=8) as server:
        status, _, err = run("--client_url", server.url, "--num_class_images", 4)
    assert status == 1 and "another retrieve.py" in err
    other.close()


def test_a_folder_of_the_reference_script_is_continued(run, tmp_path):
    folder = tmp_path / "class"
    (folder / "images").mkdir(parents=True)
    for n in range(3):
        (folder / "images" / f"{n}.jpg").write_bytes(encode(picture(n)) if n != 1 else encode(picture(n))[:3000])
    (folder / "images" / ".DS_Store").write_bytes(b"junk")
    (folder / "images" / "2.png").write_bytes(b"junk")
    (folder / "images.txt").write_text("".join(f"elsewhere/class/images/{n}.jpg\n" for n in range(3)))
    (folder / "caption.txt").write_text("a cat, number 0\na cat, number 1\na cat, number 2\n")
    with RetrievalServer(num_rows=8) as server:
        (folder / "urls.txt").write_text("".join(f"{server.url}/img/{n}\n" for n in range(3)))
        status, out, _ = run("--client_url", server.url, "--num_class_images", 6)
        asked = Counter(server.requests)
    assert status == 0 and "gone or damaged: images/1.jpg" in out
    assert_whole(folder, 6)
    assert not any(asked[f"/img/{n}"] for n in range(3))
    assert (folder / "images" / ".DS_Store").exists() and (folder / "images" / "2.png").exists()
    assert (folder / "images" / "1.jpg").stat().st_size == 3000  # damaged, no longer listed, not deleted


def test_a_removed_picture_is_replaced_and_stays_away(run, tmp_path):
    folder = tmp_path / "class"
    with RetrievalServer(num_rows=20) as server:
        run("--client_url", server.url, "--num_class_images", 6)
        removed = lists(folder)[2][2]
        (folder / "images" / "2.jpg").unlink()
        server.requests.clear()
        assert run("--client_url", server.url, "--num_class_images", 6)[0] == 0
        assert removed not in {server.url + path for path in server.requests}
    assert_whole(folder, 6)
    assert removed not in lists(folder)[2]


def test_misaligned_lists_are_refused(run, tmp_path):
    with RetrievalServer(num_rows=20) as server:
        run("--client_url", server.url, "--num_class_images", 6)
        with (tmp_path / "class" / "caption.txt").open("a") as file:
            file.write("one more\n")
        status, _, err = run("--client_url", server.url, "--num_class_images", 9)
    assert status == 1 and "caption.txt has 7 lines" in err and "images.txt has 6 lines" in err


def test_same_picture_in_flight_twice_is_kept_once(run, tmp_path):
    with RetrievalServer(num_rows=12, faults=dict.fromkeys(range(1, 6), "same_bytes")) as server:
        status, _, err = run("--client_url", server.url, "--num_class_images", 12)
    assert status == 1 and "5 duplicate" in err
    assert len(lists(tmp_path / "class")[0]) == 7


def test_a_banner_is_bounded_and_small_ones_may_do_later(run, tmp_path):
    with RetrievalServer(num_rows=4, faults={0: "small"}) as server:
        assert run("--client_url", server.url, "--num_class_images", 4)[0] == 1
        status, _, _ = run("--client_url", server.url, "--num_class_images", 4, "--min_size", 100)
    assert status == 0
    assert_whole(tmp_path / "class", 4)


def test_long_side_is_bounded():
    from custom_diffusion.retrieval.class_image import MAX_SIDE, Rejected, to_class_image

    jpeg, _, _ = to_class_image(encode(picture(1, (6000, 3000))), min_size=256)
    assert max(Image.open(BytesIO(jpeg)).size) <= MAX_SIDE
    with pytest.raises(Rejected, match="too small"):
        to_class_image(encode(picture(1, (6000, 300))), min_size=256)
