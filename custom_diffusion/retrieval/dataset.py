"""Candidates from any captioned dataset: of the Hugging Face Hub, or a local file or folder, always in streaming mode."""

import os
from collections.abc import Iterator
from pathlib import Path

from custom_diffusion.retrieval.backend import within
from custom_diffusion.retrieval.candidates import Candidate, SourceError, caption_matcher, is_web_url, one_line

HUB_SECONDS = 6  # for the Hub to answer anything
READERS = {  # suffix of a local file -> builder of `datasets` and its settings
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".arrow": ("arrow", {}),
    ".tar": ("webdataset", {}),
}
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Names in the wild, the likelier first; compared in lower case.
CAPTION_COLUMNS = (
    "caption", "text", "txt", "captions", "caption.txt", "alt_text", "alttext", "alt", "description", "top_caption",
    "sentence", "sentences", "prompt", "title", "label_text",
)  # fmt: skip
URL_COLUMNS = (
    "url",
    "image_url",
    "img_url",
    "imageurl",
    "image_link",
    "photo_url",
    "photo_image_url",
    "link",
    "coco_url",
)
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo", "file_name", "image_path")


class CaptionedDataset:
    """A source of candidates: the rows of a dataset whose caption names the class.

    Args:
        name_or_path: a Hub dataset, or a local parquet, CSV, TSV, JSONL or tar file, or a folder of such files or of pictures.
        split: of the dataset; None for "train", or the only one.
        caption_column, url_column, image_column: None to detect them.
    """

    def __init__(
        self,
        name_or_path: str,
        split: str | None = None,
        caption_column: str | None = None,
        url_column: str | None = None,
        image_column: str | None = None,
    ):
        self.name_or_path = name_or_path
        self.split = split
        self.columns = {"caption": caption_column, "url": url_column, "image": image_column}
        self.is_local = Path(name_or_path).exists()
        self.name = f"dataset {name_or_path}"
        self._opened = None

    def check(self):
        """Make sure that it can be reached and has the columns.

        Raises:
            SourceError: no such dataset, split or column; one line that says what there is.
        """
        if self._opened is None:
            if not self.is_local:
                self._check_hub()
            try:
                self._opened = self._open()
            except SourceError:
                raise
            except Exception as error:  # looking at the first row read a damaged file
                raise SourceError(f"--dataset: reading {self.name_or_path} failed: {_first_line(error)}") from error

    def _check_hub(self):
        import httpx

        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
            return  # `datasets` then looks into its cache only
        try:
            within(HUB_SECONDS, lambda: httpx.get(f"{endpoint}/api/datasets/{self.name_or_path}", timeout=HUB_SECONDS))
        except (TimeoutError, httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise SourceError(
                f"--dataset: {self.name_or_path!r} is no local file or folder, and the Hugging Face Hub cannot be reached "
                f"({one_line(str(error)) or type(error).__name__})"
            ) from None

    def candidates(self, class_prompt: str, num_missing: int) -> Iterator[Candidate]:
        """Rows whose caption has the class prompt's words, in the dataset's order.

        Raises:
            SourceError: a row cannot be read.
        """
        matches = caption_matcher(class_prompt)
        self.check()
        rows, (caption_column, url_column, image_column) = self._opened
        try:
            for number, row in enumerate(rows):
                texts = [one_line(text) for text in _texts(_field(row, caption_column))]
                caption = next((text for text in texts if text and matches(text)), None)
                if caption is None:
                    continue
                url = one_line(_field(row, url_column)) if url_column else ""
                picture, path = self._picture(_field(row, image_column)) if image_column else (None, "")
                if picture is not None:
                    yield Candidate(caption, url or self._place(row, path, number), picture)
                elif is_web_url(url or path):
                    yield Candidate(caption, url or path)
        except SourceError:
            raise
        except Exception as error:  # whatever the dozen formats and file systems behind `datasets` raise
            raise SourceError(f"{self.name}: reading it failed: {_first_line(error)}") from error

    def _place(self, row, path, number):
        """Where a picture without URL came from, different for each picture."""
        if isinstance(row, dict) and "__key__" in row:  # a webdataset tar
            return one_line(f"{row.get('__url__', self.name_or_path)}#{row['__key__']}")
        return one_line(path) or f"{self.name_or_path}#{number}"

    def _picture(self, value):
        """(encoded picture or None, its path or URL or "") of an image field."""
        if isinstance(value, bytes):
            return value, ""
        if isinstance(value, dict):
            encoded, path = value.get("bytes"), value.get("path") or ""
            return (encoded, path) if encoded is not None else self._picture(path)
        if not isinstance(value, str) or not value:
            return None, ""
        if is_web_url(value):
            return None, value
        if "://" in value:  # hf://, zip://: a file that `datasets` points to
            import fsspec

            with fsspec.open(value, "rb") as file:
                return file.read(), value
        here = Path(self.name_or_path)
        for path in (Path(value), (here if here.is_dir() else here.parent) / value):
            if path.is_file():
                return path.read_bytes(), str(path)
        return None, ""

    def _open(self):
        """(iterable of rows, (caption column, URL column or None, image column or None))."""
        if self.is_local and Path(self.name_or_path).is_dir() and (pairs := _text_pairs(Path(self.name_or_path))):
            return pairs, self._find_columns(pairs[0], {"image"})
        dataset = self._load()
        first = next(iter(dataset.take(1)), None) if dataset.features is None else {}
        names = list(dataset.features or first or ())
        if names and all("://" in name or " " in name for name in names):
            # A table without header (CC12M's): its first row was taken for the names.
            dataset = self._load(header=None, names=[f"column_{i}" for i in range(len(names))])
            names = list(dataset.features or next(iter(dataset.take(1)), None) or ())
        image_columns = {name for name, kind in (dataset.features or {}).items() if type(kind).__name__ == "Image"}
        for name in image_columns:
            dataset = dataset.cast_column(name, type(dataset.features[name])(decode=False))
        sample = next(iter(dataset.take(1)), None)
        if sample is None:
            raise SourceError(f"--dataset: {self.name_or_path} has no rows")
        columns = self._find_columns(sample, image_columns)
        if columns[2] is None and "json" not in sample:
            dataset = dataset.select_columns([name for name in columns if name is not None])
        return dataset, columns

    def _load(self, **settings):
        """The dataset's split, streaming.

        Raises:
            SourceError: no such dataset or split, or it cannot be opened.
        """
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs whole tracebacks before it raises
        path = Path(self.name_or_path)
        try:
            if path.is_file():
                suffix = next(
                    (s for s in reversed(path.suffixes) if s.lower() not in (".gz", ".zst", ".bz2", ".xz")), ""
                )
                if suffix.lower() not in READERS:
                    raise SourceError(f"--dataset: {path} must be a folder or end in one of {', '.join(READERS)}")
                builder, defaults = READERS[suffix.lower()]
                loaded = datasets.load_dataset(builder, data_files=str(path), streaming=True, **defaults | settings)
            elif path.is_dir() and any(path.rglob("metadata.*")):
                loaded = datasets.load_dataset("imagefolder", data_dir=str(path), streaming=True)
            else:
                loaded = datasets.load_dataset(self.name_or_path, streaming=True, **settings)
        except SourceError:
            raise
        except Exception as error:
            raise SourceError(
                f"--dataset: {self.name_or_path!r} is neither a local dataset nor one of the Hub that can be opened: "
                f"{_first_line(error)}"
            ) from error
        split = self.split or ("train" if "train" in loaded else next(iter(loaded)))
        if split not in loaded:
            raise SourceError(f"--split: {self.name_or_path} has no split {split!r}; it has: {', '.join(loaded)}")
        return loaded[split]

    def _find_columns(self, sample, image_columns):
        """Names of the caption, URL and image columns; the last two may be None, but not both.

        Args:
            sample: the first row.
            image_columns: columns known to hold pictures.
        Raises:
            SourceError: a named column is missing, or one cannot be detected.
        """
        fields = dict(sample) | {f"json.{name}": value for name, value in _nested(sample).items()}
        there = f"{self.name_or_path} has the columns: {', '.join(map(str, fields))}"
        for role, name in self.columns.items():
            if name is not None and name not in fields:
                raise SourceError(f"--{role}_column: there is no column {name!r}; {there}")
        caption, url, image = self.columns["caption"], self.columns["url"], self.columns["image"]
        if url is None and image is None:
            image = next(iter(sorted(image_columns)), None) or _detect(
                fields,
                IMAGE_COLUMNS,
                lambda v: isinstance(v, (bytes, dict)) or (isinstance(v, str) and not is_web_url(v)),
            )
            url = _detect(fields, URL_COLUMNS, lambda v: is_web_url(one_line(v)))
            if image is None and url is None:
                url = next(
                    (name for name, value in fields.items() if is_web_url(one_line(value)) and name != "__url__"), None
                )
            if image is None and url is None:
                raise SourceError(f"--url_column or --image_column must be given; {there}")
        if caption is None:
            others = {name: value for name, value in fields.items() if name not in (url, image)}
            caption = _detect(others, CAPTION_COLUMNS, lambda v: v is None or bool(_texts(v)) or v == "")
            if caption is None:  # the first column that reads like prose
                caption = next((name for name, value in others.items() if " " in one_line(value).strip()), None)
            if caption is None:
                raise SourceError(f"--caption_column must be given; {there}")
        return caption, url, image


def _detect(fields, names, fits):
    """The first of `names` that is a column whose first value fits."""
    by_name = {str(name).lower().removeprefix("json."): name for name in reversed(list(fields))}
    return next((by_name[name] for name in names if name in by_name and fits(fields[by_name[name]])), None)


def _nested(row):
    """The fields of a webdataset sample's .json member."""
    return row["json"] if isinstance(row.get("json"), dict) else {}


def _field(row, name):
    if name in row:
        return row[name]
    return _nested(row).get(name.removeprefix("json."))


def _texts(value):
    """The captions in a field: a string, or several (COCO's lists, or dicts with "raw")."""
    if isinstance(value, (str, bytes)):
        return [value]
    if isinstance(value, dict):
        return _texts(value.get("raw") or value.get("text") or value.get("caption"))
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts(item)]
    return []


def _text_pairs(folder):
    """Rows of a folder of pictures with a .txt of the same name beside each; [] when it is no such folder."""
    if any(folder.rglob("metadata.jsonl")) or any(folder.rglob("metadata.csv")):
        return []
    pictures = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.with_suffix(".txt").is_file()
    )
    return [
        {"image": str(p), "text": p.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")} for p in pictures
    ]


def _first_line(error):
    return one_line(str(error).strip().split("\n")[0])[:200] or type(error).__name__
