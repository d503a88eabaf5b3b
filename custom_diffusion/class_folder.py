"""The class folder on disk: its layout, and the one place that reads it.

    <class_data_dir>/images/0.jpg ...    the images
    <class_data_dir>/images.txt          line i: path of image i, relative to the folder
    <class_data_dir>/caption.txt         line i: its caption
    <class_data_dir>/urls.txt            line i: where it came from
    <class_data_dir>/.retrieve/          what `retrieve.py` remembers; training needs none of it

Three files cannot be replaced in one step, so new lists are first written whole to `.retrieve/lists/` (one rename, which
is the commit) and then moved over the old ones. Until all have moved, a list still in `.retrieve/lists/` is the valid one:
whoever reads through this module sees aligned lists at every moment, a SIGKILL between two renames included.

Writing them anew for each image would be slow. While `retrieve.py` runs, a new image is only a line of
`.retrieve/added.jsonl`, [place in the lists, path, caption, URL], which this module reads as if it stood at their end. Now and
then, and when the run ends or is stopped, the lists are written with all of it.
"""

import json
from pathlib import Path

PATHS, CAPTIONS, URLS = "images.txt", "caption.txt", "urls.txt"
STATE_DIR = ".retrieve"
ADDED = "added.jsonl"


def read_class_folder(class_data_dir: Path) -> list[tuple[Path, str]]:
    """Images of a class folder with their captions, in the order of `images.txt`.

    Args:
        class_data_dir: a folder that `retrieve.py`, the reference `retrieve.py` or a user's own script wrote.
    Returns:
        One (path of an existing file, caption) an image; empty when the folder has no lists yet.
    Raises:
        ValueError: the lists differ in length or a listed image is missing; one line that names the files.
    """
    folder = Path(class_data_dir)
    paths, captions = read_list(folder, PATHS), read_list(folder, CAPTIONS)
    if paths is None and captions is None:
        return []
    for name, lines in ((PATHS, paths), (CAPTIONS, captions)):
        if lines is None:
            raise ValueError(f"{folder / name} is missing; each line of it belongs to one image in {folder / 'images'}")
    if len(paths) != len(captions):
        raise ValueError(
            f"{folder}: {PATHS} has {len(paths)} lines but {CAPTIONS} has {len(captions)}, so captions cannot be matched to "
            f"images; mend them, or retrieve into an empty folder"
        )
    found = [find_image(folder, line) for line in paths]
    missing = [line for line, path in zip(paths, found) if path is None]
    if missing:
        raise ValueError(
            f"{folder / PATHS} lists {len(missing)} of {len(paths)} images that do not exist, first {missing[0]!r}; "
            f"run retrieve.py on this folder again, or put them back"
        )
    return list(zip(found, captions))


def read_list(folder: Path, name: str) -> list[str] | None:
    """Lines of one of the three lists, what was added since it was written included; None when there is no such file.

    Raises:
        ValueError: the file is not UTF-8 text.
    """
    # What was added first: if the lists are written with it before they are read, they hold the same lines.
    added = _read_added(folder)
    lines = _read_lines(folder, name)
    column = 1 + (PATHS, CAPTIONS, URLS).index(name)
    for entry in added:
        if entry[0] == len(lines or ()):
            lines = lines or []
            lines.append(entry[column])
    return lines


def _read_lines(folder, name):
    # The staged copy first: if it is moved away between the two reads, its destination already holds the same lines.
    for path in (folder / STATE_DIR / "lists" / name, folder / name):
        try:
            text = path.read_bytes().decode("utf-8")
        except FileNotFoundError:
            continue
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
        # Only "\n" ends a line: str.splitlines would also cut at U+2028 or form feeds inside a caption.
        lines = text.split("\n")
        if lines[-1] == "":
            lines.pop()
        return [line.rstrip("\r") for line in lines]
    return None


def _read_added(folder):
    """[place, path, caption, URL] of each image added since the lists were written."""
    try:
        text = (folder / STATE_DIR / ADDED).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    entries = []
    for line in text.split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        if isinstance(entry, list) and len(entry) == 4:
            entries.append(entry)
    return entries


def find_image(folder: Path, line: str) -> Path | None:
    """The file that a line of `images.txt` means, or None when it is nowhere.

    Lines are relative to the folder (ours), or absolute or relative to the directory of the run that wrote them (the
    reference script's). The folder's own `images/<name>` comes before those two: once a folder is moved or copied, a
    stale path could lead to somebody else's image.
    """
    name = line.replace("\\", "/").rsplit("/", 1)[-1]
    for path in (folder / line, folder / "images" / name, Path(line)):
        if name and path.is_file():
            return path
    return None
