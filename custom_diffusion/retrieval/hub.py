"""What the `datasets` library resolves and reads: datasets of the Hub, folders of tables, tars and annotated images."""

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from custom_diffusion.retrieval.candidates import SourceError, one_line
from custom_diffusion.retrieval.tables import RowsBatch

HUB_SECONDS = 6  # for the Hub to answer anything
KINDS = ("parquet", "csv", "json", "arrow", "webdataset", "imagefolder", "cache")  # others open what their rows name
MARK_ROWS = 100  # between two places to go on from


def check_hub(name: str, seconds: float):
    """Make sure that the Hub answers within so many seconds.

    Raises:
        SourceError: it does not.
    """
    import httpx

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return  # `datasets` then looks into its cache only
    try:
        within(seconds, lambda: httpx.get(f"{endpoint}/api/datasets/{name}", timeout=seconds))
    except (TimeoutError, httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise SourceError(
            f"--dataset: {name!r} is no local file or folder, and the Hugging Face Hub cannot be reached "
            f"({one_line(str(error)) or type(error).__name__})"
        ) from None


def find_dataset(name: str, is_local: bool, kind: str | None = None):
    """The builder of `datasets` for a Hub dataset, or a local file or folder.

    Args:
        name: of the dataset, or path.
        is_local: whether it is a path.
        kind: the builder of a single local file; None to let `datasets` find out.
    Raises:
        SourceError: it is none that can be opened, or a dataset of the Hub names files that are not its own.
    """
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs whole tracebacks before it raises
    path = Path(name)
    try:
        if kind is not None:
            builder = datasets.load_dataset_builder(kind, data_files=str(path))
        elif is_local and any(path.rglob("metadata.*")):
            builder = datasets.load_dataset_builder("imagefolder", data_dir=str(path))
        else:
            builder = datasets.load_dataset_builder(name)
    except Exception as error:  # whatever the dozen formats and file systems behind `datasets` raise
        raise SourceError(
            f"--dataset: {name!r} is neither a local dataset nor one of the Hub that can be opened: {short_reason(error)}"
        ) from error
    if not is_local:
        files = [file for files in (builder.config.data_files or {}).values() for file in files]
        foreign = [file for file in files if not is_own_file(name, str(file))]
        if foreign:
            raise SourceError(f"--dataset: {name} wants to read {foreign[0]}, which is no file of its own; refused")
    if kind_of(builder) not in KINDS:
        raise SourceError(f"--dataset: {name} is of the kind {kind_of(builder)!r}; only tables and images can be used")
    return builder


def kind_of(builder) -> str:
    """What a builder of `datasets` reads, as `load_dataset` names it."""
    return type(builder).__module__.rsplit(".", 1)[-1]


def is_own_file(name: str, address: str) -> bool:
    """Whether an address lies in the Hub dataset of that name, perhaps in an archive of it."""
    archive = r"(\w+://[^:]*::)?"
    return ".." not in address and bool(re.match(rf"{archive}hf://datasets/{re.escape(name)}[@/]", address))


def choose_split(there, split: str | None, name: str) -> str:
    """The split that was named, else `train`, else the first.

    Raises:
        SourceError: there is no such split.
    """
    names = [str(each) for each in there]
    chosen = split or ("train" if "train" in names else names[0])
    if chosen not in names:
        raise SourceError(f"--split: {name} has no split {chosen!r}; it has: {', '.join(names)}")
    return chosen


class StreamedDataset:
    """The rows that `datasets` streams, for kinds that have no reader of our own.

    Args:
        name: of the dataset, or path.
        builder: of `datasets`.
        split: one that it has, or None.
    Raises:
        SourceError: there is no such split.
    """

    def __init__(self, name: str, builder, split: str | None):
        self.name = name
        streams = builder.as_streaming_dataset()
        chosen = choose_split(streams, split, name)
        self._dataset = streams[chosen]
        files = (builder.config.data_files or {}).get(chosen, ())
        self.signature = [str(builder.config.name), chosen, [signature(str(file)) for file in files]]
        features = self._dataset.features or {}
        self._image_columns = {column for column, feature in features.items() if type(feature).__name__ == "Image"}
        if features:
            self._dataset = _undecoded(self._dataset, features, self._image_columns)

    def batches(self, row: int, offset: int) -> Iterator["StreamedRow"]:
        """One batch for each row."""
        rows = self._dataset.skip(row) if row else self._dataset
        for number, values in enumerate(rows, start=row):
            yield StreamedRow(number, values, self._image_columns)


def _undecoded(dataset, features, image_columns):
    """The dataset with its images as the files have them: they are decoded once, with those of other sources."""
    if hasattr(dataset, "decode"):
        return dataset.decode(False)
    for column in image_columns:  # `datasets` before 3.4 or so
        dataset = dataset.cast_column(column, type(features[column])(decode=False))
    return dataset


class StreamedRow(RowsBatch):
    """A batch of one row; the fields of a webdataset sample's .json member count as columns `json.<name>`."""

    def __init__(self, row, values, image_columns):
        nested = values.get("json")
        nested = {f"json.{name}": value for name, value in nested.items()} if isinstance(nested, dict) else {}
        super().__init__(row, [dict(values) | nested])
        self._image_columns = image_columns

    def image_columns(self):
        return self._image_columns


def signature(path: str) -> list:
    """What changes when a data file does: a Hub's address has its revision."""
    local = Path(path)
    return [path, local.stat().st_size, local.stat().st_mtime_ns] if local.is_file() else [path]


def short_reason(error: Exception) -> str:
    """The first line of what an error says."""
    return one_line(str(error).strip().split("\n")[0])[:200] or type(error).__name__


def within(seconds: float, function):
    """What `function()` returns, or TimeoutError after so many seconds of wall clock.

    A client's own timeouts cover neither name look-ups nor a server that drips.
    """
    outcome = {}

    def run():
        try:
            outcome["value"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
