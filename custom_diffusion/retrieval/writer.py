"""Fill a class folder so that it is whole at every moment, and remember what was tried, so that nothing is fetched twice.

`.retrieve/` holds
    journal.jsonl   one line for each image kept and each candidate turned down for good
    part.jpg        the image being added, until it is renamed into `images/`
    added.jsonl     what belongs at the end of the lists (see folder.py)
    lists/          lists being committed (see folder.py)
    lock            held while a process fills the folder
"""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

from custom_diffusion.class_folder import ADDED, CAPTIONS, PATHS, STATE_DIR, URLS, find_image, read_list
from custom_diffusion.retrieval.class_image import TOO_SMALL, Rejected, to_class_image
from custom_diffusion.retrieval.looks import Look, Looks

# Of all images, those that are added before the lists are written anew. Writing them for each image would take time that
# grows with the square of their number.
ADDED_SHARE = 1 / 8


class ClassFolder:
    """A class folder, and the memory of what it was filled from.

    Attributes:
        rows: (path as `images.txt` has it, caption, URL) of each image that counts.
        dropped: lines of `images.txt` whose image is gone or does not decode; they leave the lists at `open`.
        tried: URLs not to ask for again: kept, removed by the user, or turned down for good.
        fingerprints: SHA-256 of the files seen so far, as they came and as they are kept.
        looks: of the images seen so far.
    """

    def __init__(self, path: Path, min_size: int):
        """Read the folder; nothing is written before `open`.

        Args:
            min_size: least shorter side, pixels, of images to come; what was too small for a larger one may be tried again.
        Raises:
            ValueError: the lists differ in length; one line.
        """
        self.path = Path(path)
        self.state = self.path / STATE_DIR
        self.min_size = min_size
        self.lock = None
        self._journal_file = AppendedFile(self.state / "journal.jsonl")
        self._added_file = AppendedFile(self.state / ADDED)
        self._unsettled = False
        self._num_listed = 0  # images in the three lists themselves
        self._load()

    def _load(self):
        self.rows, self.dropped, self.tried, self.fingerprints, self.looks = [], [], set(), set(), Looks()
        self.journal = self._read_journal()
        kept = {entry["name"]: entry for entry in self.journal if entry.get("name") and entry.get("look")}
        for entry in self.journal:
            if entry.get("min_size", 0) <= self.min_size:
                self.tried.add(entry["url"])
            self.fingerprints.update(entry.get("fingerprints", ()))
            if entry.get("look"):
                self.looks.add(entry["look"])
        for line, caption, url in self._read_lists():
            found = find_image(self.path, line)
            if found is not None and found.parent == self.path / "images":
                line = f"images/{found.name}"  # also for lists of the reference script, so that the folder can be moved
            if found is not None and line in kept and found.stat().st_size == kept[line]["size"]:
                self.rows.append((line, caption, url))
            elif found is not None and (seen := _look_at(found)) is not None:
                self.rows.append((line, caption, url))
                self.fingerprints.update(seen[0])
                self.looks.add(seen[1])
            else:
                self.dropped.append(line)
            self.tried.add(url)

    def _read_lists(self):
        """(path, caption, URL) of each line of the lists; URLs may be missing altogether (a user's own folder)."""
        lists = {name: read_list(self.path, name) for name in (PATHS, CAPTIONS, URLS)}
        if all(lines is None for lines in lists.values()):
            return []
        if lists[URLS] is None:
            lists[URLS] = lists[PATHS]
        counts = {name: len(lines or ()) for name, lines in lists.items()}
        if len(set(counts.values())) > 1:
            described = ", ".join(f"{name} has {count} lines" for name, count in counts.items())
            raise ValueError(
                f"{self.path}: {described}, so it cannot be known which caption belongs to which image; mend the lists, "
                f"or give an empty folder as --class_data_dir"
            )
        return list(zip(*lists.values()))

    def _read_journal(self):
        entries = []
        if (self.state / "journal.jsonl").exists():
            for line in (self.state / "journal.jsonl").read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    entry = json.loads(line)
                    look = Look.from_json(entry["look"]) if "look" in entry else None
                    entries.append(entry | {"url": str(entry["url"]), "look": look})
                except (ValueError, KeyError, TypeError):
                    continue  # the last line, cut short by a kill
        return entries

    def open(self):
        """Lock the folder, finish what a killed run had begun, and make the lists list what counts.

        Raises:
            ValueError: another process is filling the folder.
            OSError: the folder cannot be written.
        """
        (self.path / "images").mkdir(parents=True, exist_ok=True)
        self.state.mkdir(exist_ok=True)
        self.lock = _lock(self.state / "lock", self.path)
        self._unsettled = True
        self._settle()

    def close(self):
        """Let other processes fill the folder; an image whose adding Ctrl-C or SIGTERM interrupted is listed first."""
        try:
            if self._unsettled:
                self._settle()
        finally:
            self._journal_file.close()
            self._added_file.close()
            if self.lock is not None:
                self.lock.close()

    def _settle(self):
        """Finish what was begun, and list what counts."""
        if (self.state / "lists").is_dir():
            self._move_lists()
        shutil.rmtree(self.state / "lists.new", ignore_errors=True)
        self._load()  # again, now that nobody else writes
        recovered = self._recover_last()
        # New images are told by their place in the lists, so all three must be there.
        lacking = self.rows and not all((self.path / name).exists() for name in (PATHS, CAPTIONS, URLS))
        if recovered or self.dropped or lacking or (self.state / ADDED).exists():
            self._commit()
        self._num_listed = len(self.rows)
        self._unsettled = False

    def _recover_last(self) -> bool:
        """Take up the image that a killed run had journaled but not yet listed."""
        part = self.state / "part.jpg"
        entry = next((e for e in reversed(self.journal) if e.get("name")), None)
        recovered = False
        if entry and entry["name"] not in {row[0] for row in self.rows}:
            target = self.path / entry["name"]
            if _sha256_of(part) == entry["jpeg"] and not target.exists():
                part.replace(target)
            if _sha256_of(target) == entry["jpeg"] and entry["name"] not in self.dropped:
                self.rows.append((entry["name"], entry["caption"], entry["url"]))
                recovered = True
        part.unlink(missing_ok=True)
        return recovered

    def add(self, jpeg: bytes, caption: str, url: str, fingerprints: tuple[str, ...], look: Look):
        """Keep an image: its file, then its line in each list.

        Args:
            jpeg: the file to write.
            caption, url: one line each.
            fingerprints: SHA-256 of the file as it came and as it is kept.
            look: what it looks like.
        """
        number = len(self.rows)
        while (self.path / "images" / f"{number}.jpg").exists():  # somebody's file; it stays
            number += 1
        name = f"images/{number}.jpg"
        part = self.state / "part.jpg"
        self._unsettled = True
        part.write_bytes(jpeg)
        # From this line on, a kill loses nothing: `_recover_last` finishes the rest.
        self._journal(
            url=url, name=name, caption=caption, jpeg=hashlib.sha256(jpeg).hexdigest(), size=len(jpeg),
            fingerprints=fingerprints, look=look.to_json(),
        )  # fmt: skip
        part.replace(self.path / name)
        self.rows.append((name, caption, url))
        self.fingerprints.update(fingerprints)
        self.looks.add(look)
        self._append_last()
        if len(self.rows) - self._num_listed >= ADDED_SHARE * len(self.rows):
            self._commit()

    def _append_last(self):
        """Add the last row to what belongs at the end of the lists."""
        self._added_file.append([len(self.rows) - 1, *self.rows[-1]])

    def turn_down(self, url: str, reason: str):
        """Remember a candidate that will never do."""
        self._journal(url=url, reason=reason, min_size=self.min_size if reason == TOO_SMALL else 0)

    def _journal(self, **entry):
        self.tried.add(entry["url"])
        self._journal_file.append(entry)

    def _commit(self):
        """Replace the three lists, in one step for readers that go through folder.py."""
        new = self.state / "lists.new"
        new.mkdir(exist_ok=True)
        for name, column in ((PATHS, 0), (CAPTIONS, 1), (URLS, 2)):
            (new / name).write_bytes("".join(row[column] + "\n" for row in self.rows).encode("utf-8"))
        new.rename(self.state / "lists")
        self._move_lists()
        self._num_listed = len(self.rows)

    def _move_lists(self):
        self._added_file.close()
        (self.state / ADDED).unlink(missing_ok=True)  # the staged lists have it
        for name in (CAPTIONS, URLS, PATHS):
            if (self.state / "lists" / name).exists():
                (self.state / "lists" / name).replace(self.path / name)
        shutil.rmtree(self.state / "lists")


class AppendedFile:
    """A file of JSON lines that is only ever added to; it stays open between lines, and is made with the first."""

    def __init__(self, path: Path):
        self.path = path
        self._file = None

    def append(self, value):
        """Add a line, at once."""
        if self._file is None:
            self._file = self.path.open("ab", buffering=0)
        # The newline comes first: a line that a kill cut short then does not swallow this one.
        line = b"\n" + json.dumps(value).encode()
        if self._file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self):
        """Let go of the file; the next line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _look_at(path: Path) -> tuple[tuple[str, str], Look] | None:
    """(hashes, look) of an image that this program did not write, or None when it does not decode."""
    encoded = path.read_bytes()
    try:
        _, pixels, look = to_class_image(encoded, min_size=1)
    except Rejected:
        return None
    return (hashlib.sha256(encoded).hexdigest(), pixels), look


def _sha256_of(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _lock(path: Path, folder: Path):
    """An open file that holds the lock until it is closed or the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where two runs on one folder are the user's to avoid
        return None
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{folder}: another retrieve.py is filling this folder; wait for it or stop it") from None
    except OSError:  # a file system without locks; as on Windows
        file.close()
        return None
    return file
