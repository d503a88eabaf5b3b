"""Going on where an earlier run stopped: nothing is skipped that was not settled, and nothing is read again that was."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from retrieval_server import RetrievalServer, encode, picture

import retrieve
from custom_diffusion.class_folder import read_class_folder
from custom_diffusion.retrieval import tables
from custom_diffusion.retrieval.captions import ClassWords
from custom_diffusion.retrieval.columns import Limits
from custom_diffusion.retrieval.scan import Scan
from custom_diffusion.retrieval.sources.dataset import CaptionedDataset

ROOT = Path(__file__).resolve().parent.parent
NUM_ROWS = 400
CATS = [n for n in range(NUM_ROWS) if n % 3 == 0]
SUFFIXES = {
    "parquet": ".parquet",
    "csv": ".csv",
    "jsonl": ".jsonl",
    "folder": "",
    "embedded": ".parquet",
    "arrow": ".arrow",
}


def write(path, kind, url="http://x"):
    """A table whose every third row is of a cat."""
    urls = [f"{url}/img/{n}" for n in range(NUM_ROWS)]
    captions = [f"a cat {n}" if n in CATS else f"a dog\n{n}" for n in range(NUM_ROWS)]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"url": urls, "caption": captions}), path, row_group_size=90)
    elif kind == "embedded":
        images = [{"bytes": encode(picture(n, (300, 300))), "path": "x.jpg"} for n in range(NUM_ROWS)]
        pyarrow.parquet.write_table(pyarrow.table({"image": images, "caption": captions}), path, row_group_size=90)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("url", "caption"), *zip(urls, captions)])
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"url": u, "caption": c}) + "\n" for u, c in zip(urls, captions)))
    elif kind == "arrow":
        table = pyarrow.table({"url": urls, "caption": captions})
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    elif kind == "folder":
        path.mkdir()
        for part in range(4):
            rows = slice(part * 100, part * 100 + 100)
            table = pyarrow.table({"url": urls[rows], "caption": captions[rows]})
            pyarrow.parquet.write_table(table, path / f"{part}.parquet", row_group_size=30)
    return path


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(tables, "BATCH_ROWS", 32)
    monkeypatch.setattr(tables, "CSV_BLOCK_BYTES", 1000)
    monkeypatch.setattr(tables, "JSON_BLOCK_BYTES", 2000)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", SUFFIXES)
def test_however_often_it_is_killed_every_candidate_is_settled_once_and_few_rows_are_read_again(tmp_path, kind, seed):
    """Candidates are settled out of order, some only on another day, and saving stops at any of them."""
    path = write(tmp_path / f"x{SUFFIXES[kind]}", kind)
    randomness = random.Random(seed)
    settled, num_runs, places = set(), 0, [[0, 0, 0]]
    while len(settled) < len(CATS):
        num_runs += 1
        assert num_runs < 200
        scan = Scan(tmp_path, "x")
        in_flight = []
        for candidate in CaptionedDataset(str(path)).candidates(ClassWords("cat"), 1, scan):
            if candidate.url in settled:
                continue
            in_flight.append(candidate)
            if len(in_flight) > 8:
                done = in_flight.pop(randomness.randrange(len(in_flight)))
                if done.image is not None or randomness.random() < 0.8:
                    settled.add(done.url)
            if randomness.random() < 0.2:
                scan.save(settled)
            if randomness.random() < 0.06:
                break  # killed
        else:
            settled.update(candidate.url for candidate in in_flight)
            scan.save(settled)
        if (tmp_path / "scans.json").exists():
            places.append(json.loads((tmp_path / "scans.json").read_text())["x"]["place"])
    assert places == sorted(places) and len(set(map(tuple, places))) > 2
    scan = Scan(tmp_path, "x")
    assert list(CaptionedDataset(str(path)).candidates(ClassWords("cat"), 1, scan)) == []
    assert (scan.num_read, scan.num_matched) == (NUM_ROWS, len(CATS))


def one_scan(state, path, wanted=None, settle=True, **settings):
    """The addresses of one whole scan, all settled and remembered at the end."""
    scan = Scan(state, "x")
    urls = [
        candidate.url
        for candidate in CaptionedDataset(str(path), **settings).candidates(wanted or ClassWords("cat"), 1, scan)
    ]
    scan.save(set(urls) if settle else set())
    return urls


def test_other_words_flags_or_content_start_anew(tmp_path):
    path = write(tmp_path / "x.csv", "csv")
    assert len(one_scan(tmp_path, path)) == len(CATS)
    assert one_scan(tmp_path, path) == []
    for wanted, settings in [
        (ClassWords("cat", also=("kitten",)), {}),
        (ClassWords("cat", without=("dog",)), {}),
        (ClassWords("cat"), {"limits": Limits(min_size=100)}),
        (ClassWords("cat"), {"caption_column": "caption"}),
        (ClassWords("cat"), {}),
    ]:
        assert len(one_scan(tmp_path, path, wanted, **settings)) == len(CATS)
        assert one_scan(tmp_path, path, wanted, **settings) == []
    path.write_bytes(path.read_bytes() + b"http://x/new,a cat\n")
    assert len(one_scan(tmp_path, path)) == len(CATS) + 1


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', '{"x": {"key": 1}}', "\0"])
def test_a_damaged_memory_is_none(tmp_path, content):
    path = write(tmp_path / "x.csv", "csv")
    one_scan(tmp_path, path)
    (tmp_path / "scans.json").write_text(content)
    assert len(one_scan(tmp_path, path)) == len(CATS)


def test_what_a_damaged_file_hides_is_looked_for_again(tmp_path):
    path = write(tmp_path / "data", "folder")
    whole = (path / "1.parquet").read_bytes()
    stat = (path / "1.parquet").stat()
    (path / "1.parquet").write_bytes(whole[:100] + bytes(len(whole) - 1100) + whole[-1000:])
    os.utime(path / "1.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    scan = Scan(tmp_path, "x")
    found = CaptionedDataset(str(path)).candidates(ClassWords("cat"), 1, scan)
    urls = set()
    with pytest.raises(Exception, match="reading it failed"):
        urls.update(candidate.url for candidate in found)
    scan.save(urls)
    (path / "1.parquet").write_bytes(whole)
    os.utime(path / "1.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = one_scan(tmp_path, path)
    assert {f"http://x/img/{n}" for n in CATS if 100 <= n < 200} <= set(again)
    assert f"http://x/img/{CATS[0]}" not in again


def command(folder, *flags):
    argv = ["--class_prompt", "cat", "--class_data_dir", folder, *flags]
    return [sys.executable, str(ROOT / "retrieve.py"), *map(str, argv)]


def test_what_may_answer_another_day_is_asked_again(tmp_path, capsys):
    with RetrievalServer(faults=dict.fromkeys(CATS[:5], "500")) as server:
        path = write(tmp_path / "x.csv", "csv", server.url)
        flags = [
            "--class_prompt",
            "cat",
            "--class_data_dir",
            tmp_path / "class",
            "--dataset",
            path,
            "--num_class_images",
        ]
        assert retrieve.main([*map(str, flags), "20"]) == 0
        server.faults.clear()
        server.requests.clear()
        assert retrieve.main([*map(str, flags), str(len(CATS))]) == 0
        assert {f"/img/{n}" for n in CATS[:5]} <= set(server.requests)
    assert len(read_class_folder(tmp_path / "class")) == len(CATS)
    assert "400 rows read, 134 of them named the class" in capsys.readouterr().out


def test_a_run_that_was_killed_goes_on(tmp_path):
    with RetrievalServer(latency=0.02) as server:
        path = write(tmp_path / "x.parquet", "parquet", server.url)
        flags = ["--dataset", path, "--num_class_images", len(CATS), "--num_workers", 4]
        for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
            before = len(list((tmp_path / "class").glob("images/*.jpg")))
            process = subprocess.Popen(
                command(tmp_path / "class", *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            while process.poll() is None and len(list((tmp_path / "class").glob("images/*.jpg"))) < before + 20:
                time.sleep(0.002)
            process.send_signal(number)
            process.communicate(timeout=20)
        server.latency = 0
        done = subprocess.run(command(tmp_path / "class", *flags), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(read_class_folder(tmp_path / "class")) == len(CATS)


def test_embedded_images_go_on_too(tmp_path, capsys):
    path = write(tmp_path / "x.parquet", "embedded")
    flags = ["--class_prompt", "cat", "--class_data_dir", tmp_path / "class", "--dataset", path, "--num_class_images"]
    for count in (20, len(CATS)):
        assert retrieve.main([*map(str, flags), str(count)]) == 0
    assert [text for _, text in read_class_folder(tmp_path / "class")] == [f"a cat {n}" for n in CATS]
