"""What was read of a source for a class: counts for messages, and the place where a later run goes on.

A place is remembered once every candidate before it is settled (kept, or turned down for good). Addresses that may answer
another day hold nothing up: they are remembered with it, and asked again after the rows that follow.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Container, Iterable
from itertools import islice
from pathlib import Path

FILE = "scans.json"  # in the class folder's `.retrieve/`
NUM_SAMPLES = 3
BROKEN = "broken rows"
NOT_WANTED = "captions with a --without word"


class Scan:
    """One source's counts and place for one class folder.

    A source reports to it from one thread, while `save` may be called from another.

    Args:
        state: the folder to remember in, or None to remember nothing.
        name: of the source.
    Attributes:
        num_read, num_matched: rows, those of earlier runs that this one goes on from included.
        left_out: reason -> rows left out before anything was fetched.
        samples: the first captions read.
    """

    def __init__(self, state: Path | None = None, name: str = ""):
        self.num_read = self.num_matched = 0
        self.left_out = Counter()
        self.samples = []
        self._path = None if state is None else Path(state) / FILE
        self._name = name
        self._key = None
        self._lock = threading.Lock()
        self._num_offered = 0
        self._unsettled = {}  # address -> (number, caption, whether the source brings the image)
        self._marks = []  # (place, counts, number of candidates before it)
        self._failed = False
        self._saved_at = time.monotonic()

    def begin(self, key: str) -> tuple[list[int] | None, list[tuple[str, str]]]:
        """Take up where an earlier run stopped.

        Args:
            key: changes with the source's content, the words and the flags; another key starts anew.
        Returns:
            The place to go on from, or None for the start; (caption, address) of what to ask again.
        """
        self._key = key
        saved = _read(self._path).get(self._name, {})
        if saved.get("key") != key:
            return None, []
        self.num_read, self.num_matched = saved["num_read"], saved["num_matched"]
        self.left_out.update(saved["left_out"])
        self.samples = saved["samples"]
        for caption, url in saved["ask_again"]:
            self.offers(caption, url, has_image=False)
        return saved["place"], [(caption, url) for caption, url in saved["ask_again"]]

    def reads(self, num_rows: int, num_broken: int = 0):
        """Count rows; broken ones come on top of the others."""
        self.num_read += num_rows + num_broken
        self.left_out[BROKEN] += num_broken

    def shows(self, captions: Iterable[str]):
        """Keep a few captions to show when none matches."""
        self.samples += islice(filter(None, captions), NUM_SAMPLES - len(self.samples))

    def offers(self, caption: str, url: str, has_image: bool):
        """Note a candidate before it is yielded, for sources that go on from a place."""
        with self._lock:
            self._unsettled.setdefault(url, (self._num_offered, caption, has_image))
            self._num_offered += 1

    def reached(self, place: list[int]):
        """Note that all candidates before this place have been yielded."""
        if not self._failed:
            counts = {
                "num_read": self.num_read,
                "num_matched": self.num_matched,
                "left_out": dict(self.left_out),
                "samples": list(self.samples),
            }
            with self._lock:
                self._marks.append((place, counts, self._num_offered))

    def fails(self):
        """Note that a part could not be read: a later run comes back to it, so no place after it is remembered."""
        self._failed = True

    def save(self, settled: Container[str], every: float = 0.0):
        """Remember the last place before which everything is settled.

        Args:
            settled: addresses that were kept or turned down for good, and are remembered as such.
            every: seconds since the last call that remembered something, before which nothing is done.
        """
        if self._path is None or self._key is None or time.monotonic() < self._saved_at + every:
            return
        self._saved_at = time.monotonic()
        with self._lock:
            self._unsettled = {url: note for url, note in self._unsettled.items() if url not in settled}
            first = min((number for number, _, has_image in self._unsettled.values() if has_image), default=None)
            passed = [mark for mark in self._marks if first is None or mark[2] <= first]
            if not passed:
                return
            place, counts, num_before = passed[-1]
            self._marks = self._marks[len(passed) - 1 :]
            again = [(caption, url) for url, (number, caption, _) in self._unsettled.items() if number < num_before]
        saved = _read(self._path) | {self._name: {"key": self._key, "place": place, "ask_again": again} | counts}
        part = self._path.with_suffix(".part")
        try:
            part.write_text(json.dumps(saved))
            part.replace(self._path)
        except OSError:
            part.unlink(missing_ok=True)  # a full disk; whoever keeps images says so, this only saves time


def _read(path):
    """Source name -> what was saved; {} when there is nothing that can be used."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"key", "place", "ask_again", "num_read", "num_matched", "left_out", "samples"}
        return {name: entry for name, entry in saved.items() if set(entry) == wanted}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
