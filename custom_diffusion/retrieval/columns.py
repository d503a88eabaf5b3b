"""Which columns of a table hold what, and what they say of an image before it is fetched."""

import math
from dataclasses import dataclass

from custom_diffusion.retrieval.candidates import SourceError, is_web_url, one_line

# Names in the wild, the likelier first; compared in lower case.
CAPTION_COLUMNS = (
    "caption", "text", "txt", "captions", "caption.txt", "alt_text", "alttext", "alt", "description", "top_caption",
    "sentence", "sentences", "prompt", "title", "label_text",
)  # fmt: skip
URL_COLUMNS = (
    "url", "image_url", "img_url", "imageurl", "image_link", "photo_url", "photo_image_url", "link", "coco_url",
)  # fmt: skip
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo", "file_name", "image_path")
# The image's own size comes before that of the copy that img2dataset made.
SIZE_COLUMNS = (("original_width", "original_height"), ("width", "height"), ("image_width", "image_height"))
NSFW_COLUMNS = ("nsfw", "punsafe", "nsfw_score", "nsfw_score_opennsfw2", "nsfw_score_gantman")
WATERMARK_COLUMNS = ("pwatermark", "watermark_score", "watermark")
NSFW_WORDS = {"unlikely": 0.0, "unsure": 0.5, "nsfw": 1.0}  # LAION-400M's and LAION-5B's
# What may speak against a row.
TOO_SMALL, NSFW, WATERMARK = "smaller than --min_size", "above --max_nsfw", "above --max_watermark"


@dataclass(frozen=True)
class Limits:
    """What a table's own columns must say for an image to be fetched; a value that is missing says nothing.

    Args:
        min_size: least shorter side, pixels.
        max_nsfw, max_watermark: greatest probability, 0 to 1; 1 takes everything.
    """

    min_size: int = 1
    max_nsfw: float = 1.0
    max_watermark: float = 1.0


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; None or empty where it has none."""

    caption: str
    url: str | None
    image: str | None
    size: tuple[str, ...] = ()
    nsfw: tuple[str, ...] = ()
    watermark: tuple[str, ...] = ()

    @property
    def needed(self) -> set[str]:
        return {name for name in (self.caption, self.url, self.image) if name is not None}

    @property
    def beside_caption(self) -> list[str]:
        return [name for name in (self.url, self.image, *self.size, *self.nsfw, *self.watermark) if name is not None]

    def too_much(self, row: dict, limits: Limits, has_image: bool) -> str | None:
        """What speaks against a row, or None.

        Args:
            row: column name -> value.
            limits: what is allowed.
            has_image: whether the row brings the image, whose size is then known better.
        """
        sides = [side for name in self.size if (side := _number(row.get(name))) > 0]
        if sides and min(sides) < limits.min_size and not has_image:
            return TOO_SMALL
        if any(_number(row.get(name)) > limits.max_nsfw for name in self.nsfw):
            return NSFW
        if any(_number(row.get(name)) > limits.max_watermark for name in self.watermark):
            return WATERMARK
        return None


def _number(value) -> float:
    """A column's value as a number; NaN, which no limit holds against, for what is none."""
    if isinstance(value, str):
        value = NSFW_WORDS.get(value.strip().lower(), value)
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def find_columns(sample: dict[str, list], image_columns: set[str], named: dict[str, str | None], table: str) -> Columns:
    """Find the caption, and the URL or the image, and what else tells of an image.

    Args:
        sample: column name -> values of the first rows, without None.
        image_columns: columns known to hold images.
        named: "caption", "url" and "image" -> the column that the user named, or None.
        table: what to call it in messages.
    Raises:
        SourceError: a named column is missing, or one cannot be detected.
    """
    there = f"{table} has the columns: {', '.join(map(str, sample))}"
    for role, name in named.items():
        if name is not None and name not in sample:
            raise SourceError(f"--{role}_column: there is no column {name!r}; {there}")
    caption, url, image = named["caption"], named["url"], named["image"]
    if url is None and image is None:
        image = next(iter(sorted(image_columns)), None) or _detect(sample, IMAGE_COLUMNS, _may_be_image)
        url = _detect(sample, URL_COLUMNS, _is_address) or (None if image else _first(sample, _is_address))
        if image is None and url is None:
            url = _without_values(sample, URL_COLUMNS)
        if image is None and url is None:
            raise SourceError(f"--url_column or --image_column must be given; {there}")
    if caption is None:
        others = {name: values for name, values in sample.items() if name not in (url, image)}
        caption = _detect(others, CAPTION_COLUMNS, lambda v: v == "" or bool(texts_of(v)))
        caption = caption or _first(others, lambda v: " " in one_line(v))  # the first column that reads like prose
        caption = caption or _without_values(others, CAPTION_COLUMNS)
        if caption is None:
            raise SourceError(f"--caption_column must be given; {there}")
    by_name = _by_name(sample)
    size = next((pair for pair in SIZE_COLUMNS if set(pair) <= set(by_name)), ())
    nsfw, watermark = ([by_name[n] for n in names if n in by_name] for names in (NSFW_COLUMNS, WATERMARK_COLUMNS))
    return Columns(caption, url, image, tuple(by_name[n] for n in size), tuple(nsfw), tuple(watermark))


def _by_name(sample):
    """Lower-case name -> column name; the first of those that differ in case only."""
    return {str(name).lower().removeprefix("json."): name for name in reversed(list(sample))}


def _detect(sample, names, fits):
    """The first of `names` that is a column with a value that fits."""
    by_name = _by_name(sample)
    return next((by_name[n] for n in names if n in by_name and any(map(fits, sample[by_name[n]]))), None)


def _without_values(sample, names):
    """The first of `names` that is a column, though none of the first rows has a value there."""
    by_name = _by_name(sample)
    return next((by_name[n] for n in names if n in by_name and not sample[by_name[n]]), None)


def _first(sample, fits):
    """The first column with a value that fits; where a tar lies is no column of its images."""
    return next((name for name, values in sample.items() if name != "__url__" and any(map(fits, values))), None)


def _may_be_image(value):
    return isinstance(value, (bytes, dict)) or (isinstance(value, str) and value != "" and not is_web_url(value))


def _is_address(value):
    return is_web_url(one_line(value))


def texts_of(value) -> list:
    """The captions in a field: a string, or several (COCO's lists, or dicts with "raw")."""
    if isinstance(value, (str, bytes)):
        return [value]
    if isinstance(value, dict):
        return texts_of(value.get("raw") or value.get("text") or value.get("caption"))
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in texts_of(item)]
    return []
