"""The class folder: read wherever it is, whole at every moment."""

import contextlib
import errno
import shutil

import pytest
from retrieval_server import body

from custom_diffusion.class_folder import read_class_folder
from custom_diffusion.retrieval.class_image import to_class_image
from custom_diffusion.retrieval.writer import AppendedFile, ClassFolder


def add(folder, n):
    jpeg, pixels, look = to_class_image(body(n, ""), 256)
    folder.add(jpeg, f"caption {n}", f"http://x/{n}", (f"file {n}", pixels), look)


def filled(path, count):
    folder = ClassFolder(path, 256)
    folder.open()
    for n in range(count):
        add(folder, n)
    folder.close()
    return folder


@pytest.mark.parametrize("form", ["relative to the folder", "absolute", "relative to the working directory"])
def test_every_form_of_path_is_read_also_after_a_move(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    filled(tmp_path / "class", 3)
    prefix = {
        "relative to the folder": "",
        "absolute": f"{tmp_path}/class/",
        "relative to the working directory": "class/",
    }[form]
    (tmp_path / "class" / "images.txt").write_text("".join(f"{prefix}images/{n}.jpg\n" for n in range(3)))
    expected = [(tmp_path / "class" / f"images/{n}.jpg", f"caption {n}") for n in range(3)]
    assert read_class_folder(tmp_path / "class") == expected
    shutil.move(tmp_path / "class", tmp_path / "moved")
    assert read_class_folder(tmp_path / "moved") == [
        (tmp_path / "moved" / f"images/{n}.jpg", f"caption {n}") for n in range(3)
    ]


def test_a_mismatch_of_counts_and_missing_pictures_are_named(tmp_path):
    filled(tmp_path, 3)
    (tmp_path / "caption.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"images.txt has 3 lines but caption.txt has 2"):
        read_class_folder(tmp_path)
    (tmp_path / "caption.txt").write_text("one\ntwo\nthree")
    (tmp_path / "images" / "1.jpg").unlink()
    with pytest.raises(ValueError, match=r"lists 1 of 3 images that do not exist, first 'images/1.jpg'"):
        read_class_folder(tmp_path)
    (tmp_path / "caption.txt").unlink()
    with pytest.raises(ValueError, match=r"caption.txt is missing"):
        read_class_folder(tmp_path)


def test_an_empty_folder_has_no_pictures(tmp_path):
    assert read_class_folder(tmp_path) == []
    assert read_class_folder(tmp_path / "nowhere") == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize("by", ["SIGKILL", "SIGTERM"])
def test_killed_before_any_single_step_nothing_is_lost_or_misaligned(tmp_path, monkeypatch, by):
    """Every system call of adding a picture and of writing the lists is the last one once."""
    from pathlib import Path

    steps = ("write_bytes", "replace", "rename", "mkdir", "open", "unlink")
    originals = {name: getattr(Path, name) for name in steps}
    for survive in range(100):
        path = tmp_path / str(survive)
        filled(path, 2)
        folder = ClassFolder(path, 256)
        folder.open()
        left = [survive]

        def dying(name, left=left):
            def step(self, *args, **kwargs):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return originals[name](self, *args, **kwargs)

            return step

        for name in steps:
            monkeypatch.setattr(Path, name, dying(name))
        originals["append"] = AppendedFile.append
        monkeypatch.setattr(AppendedFile, "append", dying("append"))
        try:
            add(folder, 2)
            folder.close()
            finished = True
        except Killed:
            finished = False
        finally:
            monkeypatch.undo()
        if by == "SIGTERM":
            folder.close()
            lists = [(path / name).read_text().splitlines() for name in ("images.txt", "caption.txt", "urls.txt")]
            assert lists == [
                [form.format(n) for n in range(len(lists[0]))]
                for form in ("images/{}.jpg", "caption {}", "http://x/{}")
            ]
            assert len(list((path / "images").iterdir())) == len(lists[0])
        else:
            folder.lock.close()  # as the kernel does
        kept = read_class_folder(path)
        assert kept == [(path / f"images/{n}.jpg", f"caption {n}") for n in range(len(kept))] and len(kept) >= 2
        again = ClassFolder(path, 256)
        again.open()
        again.close()
        if "http://x/2" in again.tried:
            assert len(again.rows) == 3  # what is not asked for again must be there
        assert len(list((path / "images").iterdir())) == len(again.rows)
        assert read_class_folder(path) == [(path / f"images/{n}.jpg", f"caption {n}") for n in range(len(again.rows))]
        assert not (path / ".retrieve" / "lists").exists() and not (path / ".retrieve" / "part.jpg").exists()
        if finished:
            break
    assert finished and survive > 8


@pytest.mark.parametrize("full_at", range(12))
def test_a_disk_that_is_full_from_any_step_on_leaves_the_lists_aligned(tmp_path, monkeypatch, full_at):
    from pathlib import Path

    filled(tmp_path, 2)
    folder = ClassFolder(tmp_path, 256)
    folder.open()
    left = [full_at]

    def failing(step):
        def write(self, *args, **kwargs):
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= 1
            return step(self, *args, **kwargs)

        return write

    for owner, name in ((Path, "write_bytes"), (Path, "mkdir"), (AppendedFile, "append")):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    with contextlib.suppress(OSError):
        add(folder, 2)
        add(folder, 3)
    with contextlib.suppress(OSError):
        folder.close()
    monkeypatch.undo()
    lists = [(tmp_path / name).read_text().splitlines() for name in ("images.txt", "caption.txt", "urls.txt")]
    assert len({len(column) for column in lists}) == 1
    kept = read_class_folder(tmp_path)
    assert kept == [(tmp_path / f"images/{n}.jpg", f"caption {n}") for n in range(len(kept))] and len(kept) >= 2
    again = filled(tmp_path, 0)
    assert read_class_folder(tmp_path) == [(tmp_path / row[0], row[1]) for row in again.rows]
    assert len(list((tmp_path / "images").iterdir())) == len(again.rows) >= len(kept)


def test_a_journal_line_cut_short_is_passed_over(tmp_path):
    filled(tmp_path, 2)
    journal = tmp_path / ".retrieve" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'\n{"url": "http://x/7", "na')
    folder = filled(tmp_path, 0)
    assert len(folder.rows) == 2 and "http://x/7" not in folder.tried
    folder.open()
    add(folder, 5)
    folder.close()
    assert "http://x/5" in ClassFolder(tmp_path, 256).tried
