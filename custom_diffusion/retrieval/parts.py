"""The parts of a dataset: its files, each with the reader that it needs."""

from functools import partial
from pathlib import Path

from custom_diffusion.retrieval.candidates import SourceError
from custom_diffusion.retrieval.hub import StreamedDataset, choose_split, find_dataset, kind_of, signature
from custom_diffusion.retrieval.image_folder import ImageFolder, find_image_folder
from custom_diffusion.retrieval.tables import (
    KINDS_BY_SUFFIX,
    TableFile,
    read_csv,
    read_json_lines,
    read_json_list,
    read_parquet,
)  # fmt: skip

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
JSON_HEAD_BYTES = 100_000  # enough for the first line


def find_parts(name: str, is_local: bool, split: str | None) -> list[TableFile | ImageFolder | StreamedDataset]:
    """What yields the batches of a dataset, one after another.

    Args:
        name: of a Hub dataset, or path.
        is_local: whether it is a path.
        split: None for "train", or the first.
    Raises:
        SourceError: it cannot be opened, or has no such split.
    """
    path, kind = Path(name), None
    if path.is_file():
        suffix = _suffix(name)
        if suffix not in KINDS_BY_SUFFIX:
            raise SourceError(f"--dataset: {path} must be a folder or end in one of {', '.join(KINDS_BY_SUFFIX)}")
        kind = KINDS_BY_SUFFIX[suffix]
        choose_split(["train"], split, name)
        if (part := _table_file(name, kind, "\t" if suffix == ".tsv" else ",", None)) is not None:
            return [part]
    elif is_local and (images := find_image_folder(path)) is not None:
        choose_split(["train"], split, name)
        return [images]
    builder = find_dataset(name, is_local, kind)
    return _table_files(builder, split, name) or [StreamedDataset(name, builder, split)]


def _table_files(builder, split, name):
    """The data files of a dataset of tables, or [] when one of them has no reader of ours."""
    config = builder.config
    if not config.data_files or getattr(config, "field", None) is not None:
        return []
    files = map(str, config.data_files[choose_split(config.data_files, split, name)])
    separator, names = getattr(config, "sep", ","), getattr(config, "names", None)
    parts = [_table_file(file, kind_of(builder), separator, names) for file in files]
    return [] if None in parts else parts


def _table_file(name, kind, separator, names):
    """A file with a reader of ours, or None."""
    is_remote = "://" in name
    if KINDS_BY_SUFFIX.get(_suffix(name)) != kind or "::" in name:
        return None
    if name.lower().endswith(COMPRESSIONS) or is_remote:
        import fsspec

        open_file = partial(fsspec.open, name, "rb", compression="infer")
    else:
        open_file = partial(open, name, "rb")
    readers = {
        "parquet": partial(read_parquet, is_remote=is_remote),
        "csv": partial(read_csv, delimiter=separator, names=names),
        "json": read_json_lines if _suffix(name) != ".json" else _json_reader(open_file),
    }
    return TableFile(name, signature(name), open_file, readers[kind]) if readers.get(kind) is not None else None


def _json_reader(open_file):
    """The reader of a `.json` file: a list of objects or one object a line; None for one object, whose values are columns."""
    with open_file() as file:
        start = file.read(JSON_HEAD_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"["):
        return read_json_list
    return read_json_lines if b"}" in start.split(b"\n")[0] else None


def _suffix(name):
    """The suffix of a file's name that says what it holds, in lower case."""
    return next((s for s in reversed(Path(name.lower()).suffixes) if s not in COMPRESSIONS), "")
