"""`retrieve.py --dataset` on real local files of every kind."""

import csv
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from dataset_hub import DatasetHub
from retrieval_server import RetrievalServer, body, encode, picture

import retrieve
from custom_diffusion.class_folder import read_class_folder
from custom_diffusion.retrieval.candidates import SourceError
from custom_diffusion.retrieval.captions import ClassWords
from custom_diffusion.retrieval.hub import is_own_file
from custom_diffusion.retrieval.scan import Scan
from custom_diffusion.retrieval.sources.dataset import CaptionedDataset

ROOT = Path(__file__).resolve().parent.parent

CAPTIONS = [
    ["Two black Cats", "a dog", "a category of things", "the cat's\ntoy", "CAT."][n % 5] + f" {n}" for n in range(15)
]
CATS = [n for n in range(15) if n % 5 in (0, 3, 4)]


def rows(server):
    return [f"{server.url}/img/{n}" for n in range(15)]


def write_parquet(path, server):
    pyarrow.parquet.write_table(pyarrow.table({"key": [*range(15)], "URL": rows(server), "TEXT": CAPTIONS}), path)


def write_table(path, server, delimiter=",", header=("image_url", "caption")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(
            [header, *zip(rows(server), CAPTIONS)] if header else zip(rows(server), CAPTIONS)
        )


def write_jsonl(path, server):
    path.write_text("".join(json.dumps({"caption": c, "url": u}) + "\n" for c, u in zip(CAPTIONS, rows(server))))


def write_image_parquet(path, server):
    images = [{"bytes": body(n, ""), "path": None} for n in range(15)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "text": CAPTIONS}), path)


def write_image_folder(path, server):
    path.mkdir()
    for n in range(15):
        (path / f"{n:02}.png").write_bytes(encode(picture(n), "PNG"))
    lines = [json.dumps({"file_name": f"{n:02}.png", "text": CAPTIONS[n]}) for n in range(15)]
    (path / "metadata.jsonl").write_text("\n".join(lines))


def write_text_folder(path, server):
    (path / "deeper").mkdir(parents=True)
    for n in range(15):
        (path / "deeper" / f"{n:02}.jpg").write_bytes(body(n, ""))
        (path / "deeper" / f"{n:02}.txt").write_text(CAPTIONS[n])
    (path / "readme.txt").write_text("a cat that is no caption")


def write_tar(path, server, captions_in="txt"):
    with tarfile.open(path, "w") as tar:
        for n in range(15):
            files = {"jpg": body(n, ""), "json": json.dumps({"caption": CAPTIONS[n], "width": 400}).encode()}
            if captions_in == "txt":
                files["txt"] = CAPTIONS[n].encode()
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{n:09}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


KINDS = {
    "urls.parquet": write_parquet,
    "urls.csv": write_table,
    "urls.tsv": lambda path, server: write_table(path, server, "\t"),
    "no_header.tsv": lambda path, server: write_table(path, server, "\t", header=None),
    "urls.jsonl": write_jsonl,
    "images.parquet": write_image_parquet,
    "image_folder": write_image_folder,
    "text_folder": write_text_folder,
    "shard.tar": write_tar,
    "json_captions.tar": lambda path, server: write_tar(path, server, captions_in="json"),
}


def run(capsys, folder, *flags, class_prompt="cat"):
    argv = ["--class_prompt", class_prompt, "--class_data_dir", str(folder), *map(str, flags)]
    try:
        status = retrieve.main(argv)
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return status, out, err


@pytest.mark.parametrize("name", KINDS)
def test_rows_that_name_the_class_are_taken(name, tmp_path, capsys):
    with RetrievalServer() as server:
        KINDS[name](tmp_path / name, server)
        status, out, err = run(capsys, tmp_path / "class", "--dataset", tmp_path / name, "--num_class_images", 20)
    assert status == 1 and "9 of 20 images" in err
    assert f"Using dataset {tmp_path / name}" in out
    captions = [caption for _, caption in read_class_folder(tmp_path / "class")]
    assert sorted(captions) == sorted(CAPTIONS[n].replace("\n", " ") for n in CATS)
    urls = (tmp_path / "class" / "urls.txt").read_text().splitlines()
    assert len(set(urls)) == 9
    for caption, url in zip(captions, urls):
        number = int(re.findall(r"\d+", caption)[-1])
        # A parquet row without address is known by its number, a picture file by its name, a tar's by its key.
        assert int(re.findall(r"\d+", url.removesuffix(".png").removesuffix(".jpg"))[-1]) == number


@pytest.mark.parametrize("name", ["urls.jsonl", "shard.tar"])
def test_a_second_run_goes_on_after_the_first(name, tmp_path, capsys):
    with RetrievalServer() as server:
        KINDS[name](tmp_path / name, server)
        for count in (4, 9):
            server.settled()
            server.requests.clear()
            before = set(read_class_folder(tmp_path / "class"))
            assert run(capsys, tmp_path / "class", "--dataset", tmp_path / name, "--num_class_images", count)[0] == 0
            assert before <= set(read_class_folder(tmp_path / "class"))
        assert len(server.requests) <= 5
    assert len(read_class_folder(tmp_path / "class")) == 9


def test_local_pictures_come_in_the_datasets_order(tmp_path, capsys):
    write_image_folder(tmp_path / "images", None)
    run(capsys, tmp_path / "class", "--dataset", tmp_path / "images", "--num_class_images", 9)
    assert [caption for _, caption in read_class_folder(tmp_path / "class")] == [
        CAPTIONS[n].replace("\n", " ") for n in CATS
    ]


def test_named_columns_win(tmp_path, capsys):
    with RetrievalServer() as server:
        pyarrow.parquet.write_table(
            pyarrow.table(
                {"url": ["http://127.0.0.1:9/x"] * 15, "caption": ["cat"] * 15, "u": rows(server), "c": CAPTIONS}
            ),
            tmp_path / "x.parquet",
        )
        flags = [
            "--dataset",
            tmp_path / "x.parquet",
            "--caption_column",
            "c",
            "--url_column",
            "u",
            "--num_class_images",
            9,
        ]
        assert run(capsys, tmp_path / "class", *flags)[0] == 0


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ["--caption_column", "words"],
            "--caption_column: there is no column 'words'; {} has the columns: key, URL, TEXT",
        ),
        (["--url_column", "href"], "--url_column: there is no column 'href'; {} has the columns: key, URL, TEXT"),
        (["--split", "test"], "--split: {} has no split 'test'; it has: train"),
    ],
)
def test_what_is_missing_is_named_with_what_there_is(flags, said, tmp_path, capsys):
    with RetrievalServer() as server:
        write_parquet(tmp_path / "x.parquet", server)
    status, _, err = run(capsys, tmp_path / "class", "--dataset", tmp_path / "x.parquet", *flags)
    assert status == 1 and said.format(tmp_path / "x.parquet") in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "name, content",
    [("x.parquet", b"no parquet"), ("x.jsonl", b'{"url": '), ("x.zip", b""), ("x.csv", b"a,b\n1,2\n"), ("empty", None)],
)
def test_what_cannot_be_used_is_explained_in_one_line(name, content, tmp_path, capsys):
    (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_bytes(content)
    status, _, err = run(capsys, tmp_path / "class", "--dataset", tmp_path / name)
    assert status == 1 and str(tmp_path / name) in err and len(err.splitlines()) == 1
    assert not (tmp_path / "class").exists()


def test_a_damaged_file_is_named_and_keeps_what_was_found_before_it(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    with RetrievalServer() as server:
        write_parquet(tmp_path / "data" / "0.parquet", server)
        damaged = (tmp_path / "data" / "0.parquet").read_bytes()
        (tmp_path / "data" / "1.parquet").write_bytes(damaged[:200] + bytes(len(damaged) - 400) + damaged[-200:])
        flags = ["--dataset", tmp_path / "data", "--num_class_images", 20]
        status, _, err = run(capsys, tmp_path / "class", *flags)
    assert status == 1 and f"dataset {tmp_path / 'data'}: reading it failed" in err and "9 of 20 images" in err
    assert len(read_class_folder(tmp_path / "class")) == 9


def test_an_unreachable_hub_is_explained(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(
        SourceError, match="'some/where' is no local file or folder, and the Hugging Face Hub cannot be reached"
    ):
        CaptionedDataset("some/where").check()


@pytest.mark.parametrize(
    "class_prompt, caption, matches",
    [
        ("cat", "Cats!", True),
        ("cat", "a category", False),
        ("cat", "scat", False),
        ("cat", "black-cat's", True),
        ("cats", "one cat", True),
        ("wooden pot", "Two POTS, wooden", True),
        ("wooden pot", "a wooden potter", False),
        ("puppy", "puppies", True),
        ("box", "boxes", True),
        ("car", "he cares", False),
        ("bus", "buses", True),
        ("glass", "glasses", True),
        ("straße", "STRASSE", True),
        ("кот", "Кот на столе", True),
    ],
)
def test_whole_words_with_case_and_plural_folded(class_prompt, caption, matches):
    assert ClassWords(class_prompt).matches(caption) is matches


def write_embedded(path, numbers, name):
    """A table of images that all bring the same path."""
    images = [{"bytes": body(n, ""), "path": name} for n in numbers]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "text": [f"a cat {n}" for n in numbers]}), path)


def test_embedded_images_with_equal_paths_are_told_apart(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    write_embedded(tmp_path / "data" / "a.parquet", range(5), "image.jpg")
    write_embedded(tmp_path / "data" / "b.parquet", range(5, 10), "image.jpg")
    origins = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        flags = ["--dataset", tmp_path / "data", "--num_class_images", 10]
        assert run(capsys, folder, *flags)[0] == 0
        assert [text for _, text in read_class_folder(folder)] == [f"a cat {n}" for n in range(10)]
        origins.append((folder / "urls.txt").read_text().splitlines())
    assert origins[0] == origins[1] and len(set(origins[0])) == 10
    assert origins[0][5] == f"{tmp_path}/data/b.parquet#0"


def test_embedded_images_with_one_web_page_are_told_apart(tmp_path, capsys):
    images = [{"bytes": body(n, ""), "path": None} for n in range(3)]
    table = {"image": images, "text": ["cat"] * 3, "url": ["https://example.org/page"] * 3}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    assert run(capsys, tmp_path / "class", "--dataset", tmp_path / "x.parquet", "--num_class_images", 3)[0] == 0
    urls = (tmp_path / "class" / "urls.txt").read_text().splitlines()
    assert urls == [f"https://example.org/page#{tmp_path}/x.parquet#{n}" for n in range(3)]


def broken_tables(url):
    """File name -> (content with three usable rows, the number of broken ones)."""
    good = [f"{url}/img/{n}" for n in range(3)]
    return {
        "commas.csv": (f"url,caption\n{good[0]},a cat\n{url}/img/9,a cat, black, big\n{good[1]},cats\n{good[2]},cat\n", 1),
        "quote.csv": (f'url,caption\n{good[0]},"a cat\n{good[1]},"two\ncats"\n{good[2]},5" of cat\n', 0),
        "open.csv": (
            f'url,caption,n\n{url}/img/9,"a cat\n{good[0]},a cat,1\n{good[1]},a cat,\n{good[2]},cat\n',
            1,
        ),
        "latin.csv": (f"url,caption\n{good[0]},a cat\n{url}/img/9,caf\xe9 cat\n{good[1]},cats\n{good[2]},cat\n", 1),
        "empty.csv": (f"url,caption\n,\n\n{good[0]},a cat\n{good[1]},cats\n{good[2]},cat\n", 0),
        "bom.csv": (f"\xef\xbb\xbfurl,caption\n{good[0]},a cat\n{good[1]},cats\n{good[2]},cat\n", 0),
        "tabs.tsv": (f"{good[0]}\ta cat\n{good[1]}\t\"cats\" here\n{good[2]}\t\"a cat\n", 0),
        "number.csv": (f"1,{good[0]},a cat\n2,{good[1]},a cat\n3,{good[2]},a cat\n", 0),
        "cut.jsonl": (
            json.dumps({"url": good[0], "caption": "cat"}) + '\n{"url": "http://x", "capt\n\n[1]\n'
            + "".join(json.dumps({"url": u, "caption": "cat"}) + "\n" for u in good[1:]), 2,
        ),
        "latin.jsonl": (
            "".join(json.dumps({"url": u, "caption": "cat"}) + "\n" for u in good) + '{"caption": "cat caf\xe9"}\n', 1,
        ),
        "types.jsonl": (
            "".join(json.dumps({"url": u, "caption": c}) + "\n" for u, c in zip([*good, 7, None], ["cat", ["cat"], "cat", 5, "cat"])), 0,
        ),
        "nan.jsonl": ("".join(f'{{"url": "{u}", "caption": "cat", "score": NaN}}\n' for u in good), 0),
        "list.json": (json.dumps([{"url": u, "caption": "cat"} for u in good] + [3]), 1),
    }  # fmt: skip


@pytest.mark.parametrize("name", broken_tables(""))
def test_a_broken_row_costs_no_other_row(name, tmp_path, capsys):
    with RetrievalServer() as server:
        content, num_broken = broken_tables(server.url)[name]
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        status, out, err = run(capsys, tmp_path / "class", "--dataset", tmp_path / name, "--num_class_images", 3)
    assert status == 0, err
    assert ("broken rows" in out) == bool(num_broken) and f"broken rows ({num_broken})" in out + "broken rows (0)"
    assert sorted(urls_of(tmp_path / "class")) == [f"{server.url}/img/{n}" for n in range(3)]


def urls_of(folder):
    return (folder / "urls.txt").read_text().splitlines()


def test_columns_that_change_from_file_to_file_are_found_in_each(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    with RetrievalServer() as server:
        urls = rows(server)
        tables = [
            {"URL": [None, *urls[:2]], "TEXT": ["a cat"] * 3},  # the first row has no address
            {"caption": ["a cat"] * 2, "n": [1, 2], "image_url": urls[2:4]},
            {"n": [1, 2]},
            {"TEXT": pyarrow.array(["a cat"] * 2, pyarrow.large_string()), "URL": pyarrow.array(urls[4:6]).dictionary_encode()},
        ]  # fmt: skip
        for n, table in enumerate(tables):
            pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "data" / f"{n}.parquet")
        flags = ["--dataset", tmp_path / "data", "--num_class_images", 6]
        status, out, err = run(capsys, tmp_path / "class", *flags)
    assert status == 0, err
    assert sorted(urls_of(tmp_path / "class")) == urls[:6]
    assert "rows without a usable address or image (1)" in out and "rows without the columns (2)" in out


@pytest.mark.parametrize("damaged", [0, 1])
def test_one_damaged_file_costs_no_other_file(damaged, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    with RetrievalServer() as server:
        for n in range(3):
            table = pyarrow.table({"url": rows(server)[2 * n : 2 * n + 2], "caption": ["cat"] * 2})
            pyarrow.parquet.write_table(table, tmp_path / "data" / f"{n}.parquet")
        content = (tmp_path / "data" / f"{damaged}.parquet").read_bytes()
        (tmp_path / "data" / f"{damaged}.parquet").write_bytes(bytes(200) + content[200:])
        status, _, err = run(capsys, tmp_path / "class", "--dataset", tmp_path / "data", "--num_class_images", 20)
    assert status == 1 and "reading it failed" in err and "4 of 20 images" in err


SECRET_ROWS = [
    "/etc/hostname",
    "file:///etc/hostname",
    "{secret}",
    "file://{secret}",
    "../secret.png",
    "hf://datasets/o/x@main/a.png",
]


def test_a_dataset_of_the_hub_reads_no_file_of_ours(tmp_path, capsys, monkeypatch):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode(picture(99), "PNG"))
    named = [text.format(secret=secret) for text in SECRET_ROWS]
    file = io.BytesIO()
    images = [{"bytes": None, "path": path} for path in named] + [{"bytes": body(1, ""), "path": "x.jpg"}]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "text": ["cat"] * len(images)}), file)
    lines = "".join(json.dumps({"image": path, "text": "cat"}) + "\n" for path in named)
    with RetrievalServer() as server:
        lines += json.dumps({"image": f"{server.url}/img/2", "text": "cat"})
        own = f"url,caption\n{server.url}/img/3,cat\n"
        (tmp_path / "own.csv").write_text(own)
        readme = f"---\nconfigs:\n- config_name: default\n  data_files: {tmp_path}/own.csv\n---\n"
        datasets = {
            "o/structs": {"data/train-00000.parquet": file.getvalue()},
            "o/lines": {"train.jsonl": lines.encode()},
            "o/yaml": {"README.md": readme.encode(), "train.csv": own.encode()},
            "o/x": {"a.png": secret.read_bytes()},
        }
        with DatasetHub(datasets) as hub:
            for name, value in hub.environment(tmp_path / "home").items():
                monkeypatch.setenv(name, value)
            said = {name: hub_run(tmp_path / name[2:], name, "--allow_private") for name in list(datasets)[:3]}
    for name in ("structs", "lines"):
        assert "1 of 20 images" in said[f"o/{name}"].stderr, said
        assert f"rows without a usable address or image ({len(named)})" in said[f"o/{name}"].stdout
    assert said["o/yaml"].returncode == 1 and "/img/3" not in server.requests  # refused by newer `datasets` themselves
    assert not (tmp_path / "yaml").exists()


@pytest.mark.parametrize(
    "address, is_own",
    [
        ("hf://datasets/o/x@main/a.csv", True),
        ("zip://a.png::hf://datasets/o/x@main/a.zip", True),
        ("hf://datasets/o/xy@main/a.csv", False),
        ("hf://datasets/o/x@main/../../p/y@main/a.csv", False),
        ("zip://hf://datasets/o/x@main::/etc/a.zip", False),
        ("file:///etc/passwd", False),
        ("/etc/hf://datasets/o/x@main/", False),
        ("https://localhost/hf://datasets/o/x@main/", False),
        ("filecache://::file:///etc/x::hf://datasets/o/x@main/a", False),
    ],
)
def test_what_is_a_hub_datasets_own_file(address, is_own):
    assert is_own_file("o/x", address) is is_own


def hub_run(folder, name, *flags):
    """In a process of its own: huggingface_hub reads the environment when it is imported."""
    command = [
        sys.executable,
        ROOT / "retrieve.py",
        "--class_prompt",
        "cat",
        "--class_data_dir",
        folder,
        "--dataset",
        name,
    ]
    command += ["--num_class_images", "20", *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def test_tables_of_the_hub_are_read_like_local_ones(tmp_path, monkeypatch):
    with RetrievalServer() as server:
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"URL": rows(server), "TEXT": CAPTIONS}), file, row_group_size=4)
        csv_rows = f"url,caption\n{server.url}/img/1,cat\n{server.url}/img/2,cat,too,many\n{server.url}/img/3,cat\n"
        names = "".join(json.dumps({"file_name": f"{n}.jpg", "text": f"cat {n}"}) + "\n" for n in range(2))
        images = {f"{n}.jpg": body(n, "") for n in range(2)} | {"metadata.jsonl": names.encode()}
        datasets = {"o/parquet": {"data/train-0.parquet": file.getvalue()}, "o/csv": {"train.csv": csv_rows.encode()}}
        datasets["o/images"] = images
        with DatasetHub(datasets) as hub:
            for name, value in hub.environment(tmp_path / "home").items():
                monkeypatch.setenv(name, value)
            parquet, table, folder = (hub_run(tmp_path / name[2:], name, "--allow_private") for name in datasets)
            server.requests.clear()
            public = hub_run(tmp_path / "public", "o/parquet")
        assert "0 of 20 images" in public.stderr and not server.requests
    assert "15 rows read, 9 of them named the class" in parquet.stdout and "9 of 20 images" in parquet.stderr
    assert "2 of 20 images" in folder.stderr
    assert "broken rows (1)" in table.stdout and "2 of 20 images" in table.stderr


def test_the_users_own_table_names_files_beside_it(tmp_path, capsys):
    (tmp_path / "data" / "images").mkdir(parents=True)
    for n in range(3):
        (tmp_path / "data" / "images" / f"{n}.png").write_bytes(encode(picture(n), "PNG"))
    places = [
        "images/0.png",
        str(tmp_path / "data" / "images" / "1.png"),
        (tmp_path / "data" / "images" / "2.png").as_uri(),
    ]
    lines = [f"{place},a cat" for place in [*places, "images/gone.png", "images", "\0"]]
    (tmp_path / "data" / "table.csv").write_text("\n".join(["file_name,caption", *lines]))
    status, out, err = run(
        capsys, tmp_path / "class", "--dataset", tmp_path / "data" / "table.csv", "--num_class_images", 3
    )
    assert status == 0, err
    status, out, _ = run(
        capsys, tmp_path / "class", "--dataset", tmp_path / "data" / "table.csv", "--num_class_images", 4
    )
    assert "rows without a usable address or image (3)" in out


SCORES = {
    "width": [1000, 200, 1000, None, 0, 1000, 1000, 1000],
    "height": [1000, 1000, 200, None, 0, 1000, 1000, 1000],
    "nsfw": [0.1, 0.1, 0.1, None, 0.1, 0.9, 0.1, 0.1],
    "watermark": [0.1, 0.1, 0.1, None, 0.1, 0.1, 0.9, 0.1],
}
COLUMN_NAMES = [
    {"width": "WIDTH", "height": "HEIGHT", "nsfw": "punsafe", "watermark": "pwatermark"},
    {"width": "width", "height": "height", "nsfw": "nsfw_score_opennsfw2", "watermark": "watermark_score"},
    {"width": "original_width", "height": "original_height", "nsfw": "NSFW", "watermark": "pwatermark"},
]


@pytest.mark.parametrize("names", COLUMN_NAMES)
def test_columns_of_size_nsfw_and_watermark_are_used_before_anything_is_fetched(names, tmp_path, capsys):
    with RetrievalServer() as server:
        table = {names[role]: values for role, values in SCORES.items()}
        if "NSFW" in table:
            words = {0.1: "UNLIKELY", 0.9: "NSFW", None: None}
            table["NSFW"] = [words[value] for value in table["NSFW"][:-1]] + ["UNSURE"]
        table |= {"URL": rows(server)[:8], "TEXT": ["cat"] * 8}
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
        flags = ["--dataset", tmp_path / "x.parquet", "--num_class_images", 8]
        status, out, err = run(capsys, tmp_path / "class", *flags)
        assert sorted(server.requests) == ["/img/0", "/img/3", "/img/4", "/img/7"]
        assert status == 1 and "4 of 8 images" in err
        assert "smaller than --min_size (2), above --max_nsfw (1), above --max_watermark (1)" in out
        for tip in ("a --min_size below 256", "a higher --max_nsfw", "a higher --max_watermark"):
            assert tip in err
        loose = [*flags, "--max_nsfw", 1, "--max_watermark", 1, "--min_size", 100]
        assert run(capsys, tmp_path / "class", *loose)[0] == 0
        assert len(server.requests) == 8


def test_the_size_of_an_embedded_image_is_its_own(tmp_path, capsys):
    table = {"image": [body(0, "")], "text": ["cat"], "width": [10], "height": [10]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    assert run(capsys, tmp_path / "class", "--dataset", tmp_path / "x.parquet", "--num_class_images", 1)[0] == 0


def test_other_names_and_words_to_leave_out(tmp_path, capsys):
    with RetrievalServer() as server:
        captions = ["a cat", "kittens", "a cat scan", "a dog", "wild mice"]
        lines = [json.dumps({"url": url, "caption": text}) for url, text in zip(rows(server), captions)]
        (tmp_path / "x.jsonl").write_text("\n".join(lines))
        flags = ["--dataset", tmp_path / "x.jsonl", "--also", "kitten", "--also", "mouse", "--without", "CAT scan"]
        _, out, _ = run(capsys, tmp_path / "class", *flags, "--num_class_images", 9)
    assert sorted(text for _, text in read_class_folder(tmp_path / "class")) == ["a cat", "kittens", "wild mice"]
    assert "captions with a --without word (1)" in out


def test_when_nothing_matches_it_says_what_there_is(tmp_path, capsys):
    lines = [json.dumps({"url": f"http://127.0.0.1:9/{n}", "caption": f"a dog {n}"}) for n in range(1200)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    status, _, err = run(capsys, tmp_path / "class", "--dataset", tmp_path / "x.jsonl")
    assert status == 1
    assert (
        "None of 1,200 rows has a caption that names the class; captions are like 'a dog 0'; 'a dog 1'; 'a dog 2'"
        in err
    )
    assert "--also" in err


def test_progress_shows_what_is_read_and_kept(tmp_path, capsys):
    with RetrievalServer() as server:
        write_parquet(tmp_path / "x.parquet", server)
        _, _, err = run(capsys, tmp_path / "class", "--dataset", tmp_path / "x.parquet", "--num_class_images", 9)
    assert re.search(r"read=15, matched=9, tried=9, kept=9", err)


def test_a_folder_of_images_without_captions_gets_the_class_prompt(tmp_path, capsys):
    (tmp_path / "photos" / "deeper").mkdir(parents=True)
    for n in range(4):
        (tmp_path / "photos" / ("deeper" if n % 2 else "") / f"{n}.jpg").write_bytes(body(n, ""))
    (tmp_path / "photos" / "notes.txt").write_text("where they come from")
    status, out, err = run(
        capsys, tmp_path / "class", "--dataset", tmp_path / "photos", "--num_class_images", 4, class_prompt="wooden pot"
    )
    assert status == 0, err
    assert "its images have no captions: each gets the class prompt as its caption" in out
    assert [text for _, text in read_class_folder(tmp_path / "class")] == ["wooden pot"] * 4


def test_folders_named_after_classes_are_heeded(tmp_path, capsys):
    for n, name in enumerate(("cats", "dogs", "cats", "dogs")):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name / f"{n}.jpg").write_bytes(body(n, ""))
    run(capsys, tmp_path / "class", "--dataset", tmp_path / "photos", "--num_class_images", 4)
    assert [url[-10:] for url in urls_of(tmp_path / "class")] == ["cats/0.jpg", "cats/2.jpg"]


def test_images_beside_a_table_are_not_taken_without_their_captions(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.jpg").write_bytes(body(0, ""))
    (tmp_path / "photos" / "captions.csv").write_text("file_name,caption\n0.jpg,cat\n")
    status, _, err = run(capsys, tmp_path / "class", "--dataset", tmp_path / "photos")
    assert status == 1 and "give that file as --dataset if it has the captions" in err and "captions.csv" in err
    flags = ["--dataset", tmp_path / "photos" / "captions.csv", "--num_class_images", 1]
    assert run(capsys, tmp_path / "class", *flags)[0] == 0


def test_images_without_text_beside_others_with_it_are_counted(tmp_path, capsys):
    write_text_folder(tmp_path / "photos", None)
    (tmp_path / "photos" / "deeper" / "00.txt").unlink()
    _, out, err = run(capsys, tmp_path / "class", "--dataset", tmp_path / "photos", "--num_class_images", 20)
    assert "8 of 20 images" in err and "rows without a caption (1)" in out


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_only_captions_that_may_match_become_python_objects(kind, tmp_path, monkeypatch):
    captions = [f"a dog of category {n}" for n in range(30_000)]
    captions[20_000] = "Cats"
    urls = [f"http://127.0.0.1:9/{n}" for n in range(30_000)]
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"url": urls, "caption": captions}), path, row_group_size=10_000)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("url", "caption"), *zip(urls, captions)])
    else:
        path.write_text("".join(json.dumps({"url": u, "caption": c}) + "\n" for u, c in zip(urls, captions)))
    looked_at = []
    matches = ClassWords.matches
    monkeypatch.setattr(ClassWords, "matches", lambda self, text: looked_at.append(text) or matches(self, text))
    found = list(CaptionedDataset(str(path)).candidates(ClassWords("cat"), 1, Scan()))
    assert [candidate.url for candidate in found] == [urls[20_000]]
    assert looked_at == ["Cats"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--dataset", "x.csv", "--min_similarity", "0.2"], "--min_similarity: belongs to a clip-retrieval backend"),
        (["--dataset", "x.csv", "--indice_name", "laion_400m"], "--indice_name: belongs to a clip-retrieval backend"),
        (
            ["--dataset", "x.csv", "--aesthetic_weight", "0.1"],
            "--aesthetic_weight: belongs to a clip-retrieval backend",
        ),
        (["--client_url", "http://127.0.0.1:9", "--max_nsfw", "0.1"], "--max_nsfw: belongs to a dataset's columns"),
        (
            ["--client_url", "http://127.0.0.1:9", "--max_watermark", "1"],
            "--max_watermark: belongs to a dataset's columns",
        ),
        (["--max_nsfw", "2"], "--max_nsfw: must be from 0 to 1"),
        (["--also", "!"], "--also: '!' has no word"),
        (["--without", ""], "--without: '' has no word"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, said, tmp_path, capsys):
    status, _, err = run(capsys, tmp_path / "class", *flags)
    assert status == 2 and f"error: {said}" in err
    assert not (tmp_path / "class").exists()


def test_other_names_are_of_one_class(tmp_path, capsys):
    with pytest.raises(SystemExit):
        retrieve.parse_args(["--concepts_list", "x.json", "--also", "kitten"])
    assert "--also: names one class" in capsys.readouterr().err


def test_a_backends_captions_without_the_class_words_are_told(tmp_path, capsys):
    with RetrievalServer(num_rows=20) as server:
        for n in range(10):
            server.rows[n]["caption"] = f"picture of the day {n}"
        flags = ["--client_url", server.url, "--allow_private", "--num_class_images"]
        status, _, err = run(capsys, tmp_path / "class", *flags, 20)
        assert (
            status == 0 and "10 of the 20 images found have a caption without the words of 'cat', first images/" in err
        )
        assert "--min_similarity" in err
        server.rows[1:10] = []
        _, _, err = run(capsys, tmp_path / "few", *flags, 11)
        assert "1 of the 11 images found have a caption without the words" in err and "--min_similarity" not in err
        status, out, err = run(capsys, tmp_path / "less", *flags, 11, "--without", "day")
        assert status == 1 and "10 of 11 images" in err and "captions with a --without word (1)" in out
