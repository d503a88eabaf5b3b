"""What every source is and yields, and the text rules that all sources share."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from custom_diffusion.retrieval.captions import ClassWords
from custom_diffusion.retrieval.scan import Scan


class SourceError(Exception):
    """A source cannot be used; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Candidate:
    """An image that may become a class image.

    Args:
        caption: one line, never empty.
        url: one line, the candidate's identity: an http(s) address to download, or, with `image`, where the image came
            from, different for each image and the same in every run.
        image: the encoded file itself, when the source has it.
    """

    caption: str
    url: str
    image: bytes | None = None


class Source(Protocol):
    """Where candidates come from. A new kind of source is one file in `sources/`, whose `__init__.py` says what is in it.

    Attributes:
        name: what to call it in messages.
        is_own: whether it is the user's, as a table on their disk or a service on their network; only then may its rows
            name addresses on private networks. Known after `check`.
    """

    name: str
    is_own: bool

    def check(self) -> None:
        """Make sure that it can be used. Raises SourceError."""

    def candidates(self, wanted: ClassWords, num_missing: int, scan: Scan) -> Iterator[Candidate]:
        """Candidates, the best first or in the source's order, without those whose caption `wanted` excludes.

        A source of captions leaves out those that do not match too, by `wanted.matches`. It tells `scan.reads` of every row,
        and counts in `scan.num_matched` and `scan.left_out`. One that can go on from a place also uses `scan.begin`, `offers`
        and `reached`.

        Args:
            wanted: the class, and which captions name it.
            num_missing: how many images are wanted at least.
            scan: told what is read, matched and left out; may know where an earlier run stopped.
        Raises:
            SourceError: it failed on the way.
        """


def one_line(value) -> str:
    """Any value a source may send as text, on one line; "" for None, NaN and what is not text.

    Line separators that only Unicode knows (U+2028, U+0085) and control characters count as spaces too: a list must have
    one line an image for whoever reads it, also with `str.splitlines`.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if not isinstance(value, str):
        return ""
    # Surrogates (half of an emoji cut off by somebody's truncation) cannot be written as UTF-8.
    value = value.encode("utf-8", errors="replace").decode("utf-8")
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in value).split())


def is_web_url(url: str) -> bool:
    """Whether it is an absolute http(s) address with a host."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False
