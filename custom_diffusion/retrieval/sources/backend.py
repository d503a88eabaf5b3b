"""Candidates from a clip-retrieval backend: its `knn-service` protocol, spoken directly.

clip-retrieval's own client turns every failure into a JSON error, and would hold diffusers and transformers back.
"""

import argparse
import asyncio
import json
import math
import os
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

from custom_diffusion.retrieval.candidates import Candidate, SourceError, is_web_url, one_line
from custom_diffusion.retrieval.captions import ClassWords
from custom_diffusion.retrieval.scan import NOT_WANTED, Scan

INDICE_NAME, AESTHETIC_WEIGHT = "laion_400m", 0.1  # the reference script's
LAION_URL = "https://knn.laion.ai/knn-service"  # the reference script's; gone since early 2024
CONNECT_SECONDS = 6  # for an answer of any kind from the server, name look-up included
QUERY_SECONDS = 120  # a large index on disk takes that long when cold
MAX_NUM_IMAGES = 100_000
MAX_LIST_BYTES, MAX_ROWS_BYTES = 2**20, 2**28  # of the answers; an index of local files sends the images with the rows


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--client_url", help="clip-retrieval backend (default: $CLIP_RETRIEVAL_URL, else LAION's, gone since 2024)")
    add("--indice_name", help=f"the backend's index (default: {INDICE_NAME})")
    add("--aesthetic_weight", type=float, metavar="W", help=f"0 to 1; the backend's (default: {AESTHETIC_WEIGHT})")
    add(
        "--min_similarity", type=float, metavar="S", help="least CLIP similarity of a backend's row to the class prompt"
    )


def is_named(args: argparse.Namespace) -> bool:
    return args.client_url is not None


def is_default() -> bool:
    return True


def flag_problems(args: argparse.Namespace, used: bool) -> Iterator[str]:
    if args.aesthetic_weight is not None and not 0 <= args.aesthetic_weight <= 1:
        yield f"--aesthetic_weight: must be from 0 to 1, is {args.aesthetic_weight}"
    if args.min_similarity is not None and not -1 <= args.min_similarity <= 1:
        yield f"--min_similarity: must be from -1 to 1, is {args.min_similarity}"
    if args.client_url is not None and not args.client_url.startswith(("http://", "https://")):
        yield f"--client_url: must start with http:// or https://, is {args.client_url!r}"
    for name in ("indice_name", "aesthetic_weight", "min_similarity"):
        if getattr(args, name) is not None and not used:
            yield f"--{name}: belongs to a clip-retrieval backend, which is not asked here; leave it out or add --client_url"


def from_flags(args: argparse.Namespace) -> "KnnBackend":
    weight = AESTHETIC_WEIGHT if args.aesthetic_weight is None else args.aesthetic_weight
    return KnnBackend(args.client_url or default_url(), args.indice_name or INDICE_NAME, weight, args.min_similarity)


class KnnBackend:
    """A source of candidates.

    Args:
        url: of the service; `/knn-service` is added to a bare `http://host:port`.
        indice_name: the index to search, as the backend's `indices_paths.json` names it.
        aesthetic_weight: 0 to 1; how far beautiful images are preferred (ignored by backends without that model).
        min_similarity: least CLIP similarity of a row to the class prompt, or None.
    Attributes:
        is_own: whether it is on a private network, where its rows may name other addresses; known after `check`.
    """

    def __init__(self, url: str, indice_name: str, aesthetic_weight: float, min_similarity: float | None):
        self.url = _service_url(url)
        self.indice_name = indice_name
        self.aesthetic_weight = aesthetic_weight
        self.min_similarity = min_similarity
        self.name = f"clip-retrieval backend {self.url} (index {indice_name})"
        self.is_own = False

    def check(self):
        """Make sure that something answers there, and that it has the index.

        Raises:
            SourceError: nothing answers, or the index is not among those that the backend lists.
        """
        indices_url = self.url.removesuffix("/knn-service") + "/indices-list"
        _, text = self._request("GET", indices_url, CONNECT_SECONDS, MAX_LIST_BYTES)
        try:
            names = json.loads(text)
        except (ValueError, RecursionError):
            return  # behind a proxy that forwards the service only; the query will tell
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            return
        if self.indice_name not in names:
            has = ", ".join(names) or "no index at all"
            raise SourceError(
                f"--indice_name: the backend at {self.url} has no index {self.indice_name!r}; it has: {has}"
            )

    def candidates(self, wanted: ClassWords, num_missing: int, scan: Scan) -> Iterator[Candidate]:
        """Rows by falling similarity, asking for more as long as that brings new ones.

        The backend drops near-duplicates after its search, so a short answer does not mean that the index is exhausted.

        Raises:
            SourceError: the backend does not answer, or not with rows.
        """
        seen = set()
        num_images = max(math.ceil(1.5 * num_missing), 16)
        while True:
            new, below = 0, False
            for row in self._query(wanted.prompt, num_images):
                key = row.get("id", row.get("url"))
                if isinstance(key, (list, dict)) or key in seen:
                    continue
                seen.add(key)
                new += 1
                scan.reads(1)
                if self.min_similarity is not None and not _similarity(row) >= self.min_similarity:
                    below = True
                    continue
                if (candidate := _candidate(row, wanted.prompt)) is None:
                    continue
                if wanted.excludes(candidate.caption):
                    scan.left_out[NOT_WANTED] += 1
                    continue
                yield candidate
            if not new or below or num_images >= MAX_NUM_IMAGES:
                return
            num_images = min(2 * num_images, MAX_NUM_IMAGES)

    def _query(self, text, num_images):
        body = {
            "text": text,
            "image": None,
            "image_url": None,
            "embedding_input": None,
            "deduplicate": True,
            "use_safety_model": True,
            "use_violence_detector": True,
            "indice_name": self.indice_name,
            "use_mclip": False,
            "aesthetic_score": 9,
            "aesthetic_weight": self.aesthetic_weight,
            "modality": "image",
            "num_images": num_images,
            "num_result_ids": num_images,
        }
        status, text = self._request("POST", self.url, QUERY_SECONDS, MAX_ROWS_BYTES, body)
        if status != 200:
            raise SourceError(f"{self.name}: {_explain_status(status, self.indice_name)}")
        try:
            rows = json.loads(text)  # Python's parser takes the bare NaN that backends send
        except (ValueError, RecursionError):
            start = one_line(text[:200])[:60]
            raise SourceError(
                f"{self.name}: the answer is not JSON but starts {start!r}; this is no clip-retrieval backend, check --client_url"
            ) from None
        if not isinstance(rows, list):
            raise SourceError(f"{self.name}: the answer is no list of rows but {one_line(json.dumps(rows))[:80]}")
        return [row for row in rows if isinstance(row, dict)]

    def _request(self, method, url, seconds, max_bytes, body=None):
        """(status, text) of an answer."""
        from custom_diffusion.retrieval.class_image import Rejected

        try:
            return asyncio.run(self._ask(method, url, seconds, max_bytes, body))
        except Rejected as rejected:
            reason = one_line(str(rejected.__cause__ or "")) or str(rejected)
            if isinstance(rejected.__cause__, asyncio.TimeoutError):
                reason = f"no answer within {seconds} seconds"
        raise SourceError(
            f"cannot reach the {self.name}: {reason}; start it or correct --client_url, or use --dataset NAME_OR_PATH"
        )

    async def _ask(self, method, url, seconds, max_bytes, body):
        from custom_diffusion.retrieval.client import Client

        async with Client(seconds, allow_private=False) as client:
            # The user named this address, wherever it is; a public one may not lead to a private one.
            status, answer = await client.request(method, url, max_bytes, True, "application/json", body)
            self.is_own = await client.is_private(url)
        return status, answer.decode("utf-8", errors="replace")


def _service_url(url):
    parts = urlsplit(url.strip().rstrip("/"))
    return urlunsplit(parts._replace(path=parts.path or "/knn-service"))


def _similarity(row):
    value = row.get("similarity")
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.nan


def _candidate(row, class_prompt):
    """A row as a candidate, or None when it has neither an address nor the image itself."""
    caption = one_line(row.get("caption")) or class_prompt
    url = one_line(row.get("url"))
    if is_web_url(url):
        return Candidate(caption, url)
    # An index of images on the backend's own disk: the row brings the image, base64-encoded.
    if isinstance(row.get("image"), str) and one_line(row.get("image_path")):
        import base64

        path = one_line(row["image_path"])
        if not path.startswith("/"):  # a key that files of several archives may share
            path += f"#{row.get('id')}"
        try:
            return Candidate(caption, path, base64.b64decode(row["image"]))
        except ValueError:
            return None
    return None


def _explain_status(status, indice_name):
    if status >= 500:
        return (
            f"it answered {status} (it says so for an empty index too, and when an image in the index is RGBA); see the "
            f"backend's own log, or try another index than {indice_name!r} with --indice_name"
        )
    if status in (404, 405):
        return f"it answered {status}; --client_url must be the address of the service, http://HOST:1234/knn-service"
    return f"it answered {status}; check --client_url"


def default_url() -> str:
    """`CLIP_RETRIEVAL_URL` of the environment, else LAION's address."""
    return os.environ.get("CLIP_RETRIEVAL_URL", "").strip() or LAION_URL
