"""`retrieve.py --dataset` on real local files of every kind."""

import csv
import io
import json
import re
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
from retrieval_server import RetrievalServer, body, encode, picture

import retrieve
from custom_diffusion.retrieval.candidates import SourceError
from custom_diffusion.retrieval.captions import ClassWords
from custom_diffusion.retrieval.dataset import CaptionedDataset
from custom_diffusion.retrieval.folder import read_class_folder

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
