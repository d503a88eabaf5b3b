"""Candidates from any captioned dataset: of the Hugging Face Hub, or a local file or folder, never downloaded whole."""

import argparse
import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from custom_diffusion.retrieval.candidates import Candidate, SourceError, is_web_url, one_line
from custom_diffusion.retrieval.captions import ClassWords, first_values
from custom_diffusion.retrieval.columns import Limits, find_columns, texts_of
from custom_diffusion.retrieval.hub import HUB_SECONDS, MARK_ROWS, check_hub, is_own_file, short_reason
from custom_diffusion.retrieval.image_folder import ImageFolder
from custom_diffusion.retrieval.parts import find_parts
from custom_diffusion.retrieval.scan import BROKEN, NOT_WANTED, Scan
from custom_diffusion.retrieval.sources.backend import LAION_URL, default_url

DEFAULT_DATASET = "kakaobrain/coyo-700m"  # 747 million captions and URLs, open to everybody
MAX_NSFW = MAX_WATERMARK = 0.5
NO_CAPTION = "rows without a caption"
NO_COLUMNS = "rows without the columns"
NO_IMAGE = "rows without a usable address or image"
TAR_COLUMNS = ("__url__", "__key__")  # where a webdataset sample lies
CHECKED_PARTS, CHECKED_BATCHES = 10, 20  # in which columns are looked for
MAX_FAILED_PARTS = 3  # of a Hub dataset in one run: the Hub may be gone
STATE_FORMAT = 1  # of what a scan's place and key mean


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--dataset", metavar="NAME_OR_PATH", help="captioned dataset: of the Hugging Face Hub, a local file or a folder"
    )
    add("--split", help="of the dataset (default: train)")
    add("--caption_column", help="of the dataset (default: detected, as are the next two)")
    column = parser.add_mutually_exclusive_group()
    column.add_argument("--url_column", help="column with addresses of images")
    column.add_argument("--image_column", help="column with the images themselves")
    for name, greatest in (("nsfw", MAX_NSFW), ("watermark", MAX_WATERMARK)):
        add(
            f"--max_{name}",
            type=float,
            metavar="P",
            help=f"greatest {name.replace('nsfw', 'NSFW')} probability in the dataset's columns; 1 takes all (default: {greatest})",
        )


def is_named(args: argparse.Namespace) -> bool:
    return args.dataset is not None


def is_default() -> bool:
    """Only where the default backend is LAION's, which has been gone for years."""
    return default_url() == LAION_URL


def flag_problems(args: argparse.Namespace, used: bool) -> Iterator[str]:
    for name in ("max_nsfw", "max_watermark"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1:
            yield f"--{name}: must be from 0 to 1, is {getattr(args, name)}"
    for name in ("split", "caption_column", "url_column", "image_column"):
        if getattr(args, name) is not None and args.dataset is None:
            yield f"--{name}: belongs to --dataset, which is missing"
    for name in ("max_nsfw", "max_watermark"):
        if getattr(args, name) is not None and not used:
            yield f"--{name}: belongs to a dataset's columns, and no dataset is read here; leave it out or add --dataset"


def from_flags(args: argparse.Namespace) -> "CaptionedDataset":
    max_nsfw = MAX_NSFW if args.max_nsfw is None else args.max_nsfw
    max_watermark = MAX_WATERMARK if args.max_watermark is None else args.max_watermark
    columns = (args.split, args.caption_column, args.url_column, args.image_column)
    limits = Limits(args.min_size, max_nsfw, max_watermark)
    return CaptionedDataset(args.dataset or DEFAULT_DATASET, *columns, limits)


class CaptionedDataset:
    """A source of candidates: the rows of a dataset whose caption names the class.

    Args:
        name_or_path: a Hub dataset, or a local Parquet, CSV, TSV, JSONL or tar file, or a folder of such files or of images.
        split: of the dataset; None for "train", or the first where there is none of that name.
        caption_column, url_column, image_column: None to detect them.
        limits: what the table's columns must say of an image.
    """

    def __init__(
        self,
        name_or_path: str,
        split: str | None = None,
        caption_column: str | None = None,
        url_column: str | None = None,
        image_column: str | None = None,
        limits: Limits | None = None,
    ):
        self.name_or_path = name_or_path
        self.split = split
        self.named_columns = {"caption": caption_column, "url": url_column, "image": image_column}
        self.limits = limits or Limits()
        self.is_own = Path(name_or_path).exists()
        self.name = f"dataset {name_or_path}"
        self._parts = None  # the files of it
        self._columns = None
        self._other_columns = {}  # column names of a part that lacks those -> its columns, or None

    def check(self):
        """Make sure that it can be reached and has the columns.

        Raises:
            SourceError: no such dataset, split or column; one line that says what there is.
        """
        if self._parts is not None:
            return
        if not self.is_own:
            check_hub(self.name_or_path, HUB_SECONDS)
        try:
            parts = find_parts(self.name_or_path, self.is_own, self.split)
            self._columns = self._first_columns(parts)
        except SourceError:
            raise
        except Exception as error:  # looking at the first rows read a damaged file
            raise SourceError(f"--dataset: reading {self.name_or_path} failed: {short_reason(error)}") from error
        self._parts = parts
        if isinstance(parts[0], ImageFolder) and not parts[0].has_captions:
            self.name += " (its images have no captions: each gets the class prompt as its caption)"

    def candidates(self, wanted: ClassWords, num_missing: int, scan: Scan) -> Iterator[Candidate]:
        """Rows whose caption names the class, in the dataset's order, then those that an earlier run could not fetch.

        Raises:
            SourceError: a part of it cannot be read; the others have been.
        """
        self.check()
        place, ask_again = scan.begin(self._key(wanted))
        first_part, row, offset = place or (0, 0, 0)
        failures = []
        for number in range(first_part, len(self._parts)):
            scan.reached([number, row, offset])
            try:
                yield from self._of_part(number, row, offset, wanted, scan)
            except Exception as error:  # whatever the dozen formats and file systems behind `datasets` raise
                failures.append(f"{self.name}: reading it failed: {short_reason(error)}")
                scan.fails()
            row = offset = 0
            if len(failures) == MAX_FAILED_PARTS and not self.is_own:
                break
        scan.reached([len(self._parts), 0, 0])
        for caption, url in ask_again:
            yield Candidate(caption, url)
        if failures:
            raise SourceError(failures[0])

    def _key(self, wanted):
        """What a remembered place is worth nothing without."""
        parts = [part.signature for part in self._parts]
        words = [wanted.prompt, wanted.also, wanted.without]
        what = [STATE_FORMAT, parts, self.split, self.named_columns, words, vars(self.limits)]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def _of_part(self, number, row, offset, wanted, scan):
        """The candidates of one part from a place on."""
        part = self._parts[number]
        for batch in part.batches(row, offset):
            if batch.num_rows > 1 or batch.row % MARK_ROWS == 0:
                scan.reached([number, batch.row, batch.offset])
            for caption, url, image in self._of_batch(part, batch, wanted, scan):
                scan.offers(caption, url, image is not None)
                yield Candidate(caption, url, image)

    def _of_batch(self, part, batch, wanted, scan):
        """(caption, address, image or None) of a batch's candidates."""
        scan.reads(batch.num_rows, batch.num_broken)
        columns = self._columns_of(batch)
        if columns is None:
            scan.left_out[NO_COLUMNS] += batch.num_rows
            return
        if isinstance(part, ImageFolder) and not part.has_captions:
            matched = [(0, wanted.prompt)] if part.is_of_class(batch, wanted) else []
        else:
            matched = _matches(batch.values(columns.caption), wanted, scan)
        scan.num_matched += len(matched)
        names = [name for name in (*columns.beside_caption, *TAR_COLUMNS) if name in batch.names]
        for (index, caption), row in zip(matched, batch.take([index for index, _ in matched], names)):
            url, image = self._address_and_image(part, batch.row + index, row, columns)
            if not url:
                scan.left_out[NO_IMAGE] += 1
            elif reason := columns.too_much(row, self.limits, has_image=image is not None):
                scan.left_out[reason] += 1
            else:
                yield caption, url, image

    def _address_and_image(self, part, number, row, columns):
        """(the candidate's address or "", the encoded image or None) of a row."""
        url = one_line(row.get(columns.url))
        image, path = self._image(row.get(columns.image), part)
        if image is None:
            url = url or one_line(path)
            return (url if is_web_url(url) else ""), None
        if "__key__" in row:  # a webdataset tar
            path = f"{row.get('__url__', part.name)}#{row['__key__']}"
        # Not the path that an embedded image may bring: many tables have the same for all.
        place = one_line(path) or f"{part.name}#{number}"
        return (f"{url}#{place}" if is_web_url(url) else place), image

    def _image(self, value, part):
        """(encoded image or None, the file or URL that it is, or "") of an image field."""
        if isinstance(value, bytes):
            return value, ""
        if isinstance(value, dict):
            encoded = value.get("bytes")
            return (encoded, "") if isinstance(encoded, bytes) else self._image(value.get("path"), part)
        if not isinstance(value, str) or not value or is_web_url(value):
            return None, value or ""
        try:
            if "://" in value:  # hf://, zip://: a file that `datasets` or the user's own table points to
                return self._file_behind(value), value
            return next(
                ((path.read_bytes(), str(path)) for path in self._own_paths(value, part) if path.is_file()), (None, "")
            )
        except (OSError, ValueError):  # not to be read, or no path at all
            return None, ""

    def _file_behind(self, address):
        """What lies there; None when a stranger's table has no business there."""
        import fsspec

        if not self.is_own and not is_own_file(self.name_or_path, address):
            return None
        with fsspec.open(address, "rb") as file:
            return file.read()

    def _own_paths(self, value, part):
        """Where a file that a row names may lie: none, unless the table is the user's own."""
        if not self.is_own:
            return ()
        here = Path(self.name_or_path)
        return (Path(part.name).parent / value, (here if here.is_dir() else here.parent) / value, Path(value))

    def _columns_of(self, batch):
        """The batch's columns, or None when it has no caption or no image: tables change on the way."""
        names = set(batch.names)
        if self._columns.caption in names and names & {self._columns.url, self._columns.image}:
            return self._columns
        if batch.num_rows < 2:
            return self._columns if self._columns.caption in names else None
        key = tuple(batch.names)
        if key not in self._other_columns:
            try:
                self._other_columns[key] = self._find_columns(batch)
            except SourceError:
                self._other_columns[key] = None
        return self._other_columns[key]

    def _find_columns(self, batch):
        return find_columns(batch.sample(), batch.image_columns(), self.named_columns, self.name_or_path)

    def _first_columns(self, parts):
        """The columns of the first rows that have any.

        Raises:
            SourceError: there are none.
        """
        failures, num_broken = [], 0
        for part in parts[:CHECKED_PARTS]:
            try:
                for batch in islice(part.batches(0, 0), CHECKED_BATCHES):
                    num_broken += batch.num_broken
                    try:
                        if batch.num_rows:
                            return self._find_columns(batch)
                    except SourceError as error:
                        failures.append(error)
            except Exception as error:  # a damaged file
                failures.append(SourceError(f"--dataset: reading {self.name_or_path} failed: {short_reason(error)}"))
        broken = f" that can be read ({num_broken} cannot)" if num_broken else ""
        raise failures[0] if failures else SourceError(f"--dataset: {self.name_or_path} has no rows{broken}")


def _matches(values, wanted, scan):
    """(index, caption) of the rows that name the class.

    Args:
        values: a column, as an Arrow array or a list.
    """
    scan.shows(map(one_line, texts_of(first_values(values))))
    likely = wanted.likely(values)
    scan.left_out[BROKEN] += likely.num_undecodable
    scan.left_out[NO_CAPTION] += likely.num_missing
    matched = []
    for index, value in zip(likely.indices, likely.values):
        texts = [text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in texts_of(value)]
        caption = next((text for text in texts if wanted.matches(text)), None)
        if caption is None:
            continue
        if any(map(wanted.excludes, texts)):
            scan.left_out[NOT_WANTED] += 1
        else:
            matched.append((index, one_line(caption)))
    return matched
