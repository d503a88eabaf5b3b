"""Tables on a disk or on the Hub, read in batches: Parquet, CSV and JSON lines.

What a batch holds is turned into Python objects for the rows that are asked for only, so that a million rows of which few
match take about as long as reading them. A row that cannot be read is left out and counted, and costs no other row.
"""

import csv
import io
import json
from collections import deque
from collections.abc import Callable, Iterator
from typing import BinaryIO

KINDS_BY_SUFFIX = {  # of a file -> builder of `datasets`
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
BATCH_ROWS = 65_536
IMAGE_BATCH_ROWS = 16  # of a column with whole image files
CSV_BLOCK_BYTES = 1_000_000
JSON_BLOCK_BYTES = 4_000_000
SAMPLE_ROWS = 200
MAX_ROW_LINES = (
    100  # of one CSV row with line breaks in its fields; a quote that is never closed would take all that follow
)
CSV_FIELD_BYTES = 10_000_000


class RowsBatch:
    """A batch of rows that are Python objects already.

    Attributes of every kind of batch:
        row: number of the first row in its table.
        offset: bytes before it, where reading can go on; 0 when that takes the row only.
        num_rows: rows that can be read.
        num_broken: rows beside them that cannot.
        names: of the columns.
    """

    def __init__(
        self, row: int, rows: list[dict], names: list[str] | None = None, offset: int = 0, num_broken: int = 0
    ):
        self.row, self.offset, self.num_rows, self.num_broken = row, offset, len(rows), num_broken
        self.rows = rows
        self.names = names if names is not None else list(dict.fromkeys(name for row in rows for name in row))

    def sample(self) -> dict[str, list]:
        """Column name -> values of the first rows, without None; of an image file, just that it is one."""
        some = self.rows[:SAMPLE_ROWS]
        return {name: [row[name] for row in some if row.get(name) is not None] for name in self.names}

    def image_columns(self) -> set[str]:
        """Columns that are known to hold images."""
        return set()

    def values(self, name: str):
        """A column, as an Arrow array or a list."""
        return [row.get(name) for row in self.rows]

    def take(self, indices: list[int], names: list[str]) -> Iterator[dict]:
        """Columns of some rows, by rising index."""
        return ({name: self.rows[index].get(name) for name in names} for index in indices)


class RecordsBatch(RowsBatch):
    """A batch of lists of strings, as a CSV file has them."""

    def sample(self):
        some = self.rows[:SAMPLE_ROWS]
        return {name: [row[i] for row in some] for i, name in enumerate(self.names)}

    def values(self, name):
        import pyarrow

        column = self.names.index(name)
        return pyarrow.array([row[column] for row in self.rows], pyarrow.string())

    def take(self, indices, names):
        columns = [(name, self.names.index(name)) for name in names]
        return ({name: self.rows[index][column] for name, column in columns} for index in indices)


class ArrowBatch(RowsBatch):
    """A batch that is an Arrow table."""

    def __init__(self, row, table, offset):
        self.row, self.offset, self.num_rows, self.num_broken = row, offset, table.num_rows, 0
        self.names = table.column_names
        self.table = table

    def sample(self):
        return _sample_of(self.table)

    def values(self, name):
        return self.table[name].combine_chunks()

    def take(self, indices, names):
        yield from self.table.select(names).take(indices).to_pylist()


def read_csv(file: BinaryIO, row: int, offset: int, delimiter: str, names: list[str] | None) -> Iterator[RecordsBatch]:
    """Batches of a CSV file.

    Args:
        file: open for reading, at its start.
        row, offset: where to begin; 0, 0 for the start.
        delimiter: between fields.
        names: of the columns, or None to take the first row's fields, unless they look like data: then column_0, ...
    """
    csv.field_size_limit(CSV_FIELD_BYTES)
    records = _Records(file, delimiter)
    if names is None:
        first = next(iter(records), None)
        if first is None:
            return
        names = first
        if any("://" in name for name in names):  # a table without header, such as CC12M's
            names = [f"column_{i}" for i in range(len(first))]
            records = _Records(file, delimiter)
            file.seek(0)
    records.width = len(names)
    if offset:
        records.go_to(offset)
    for start, batch, num_broken in records.blocks():
        yield from _csv_batch(batch, names, row, start, num_broken)
        row += len(batch)


def _csv_batch(records, names, row, offset, num_broken):
    """The batch of these records, without those that are not UTF-8."""
    try:
        "".join(map("".join, records)).encode()
    except UnicodeEncodeError:
        utf8 = [record for record in records if _is_utf8(record)]
        num_broken += len(records) - len(utf8)
        records = utf8
    if records or num_broken:
        yield RecordsBatch(row, records, names, offset, num_broken)


def _is_utf8(record):
    try:
        "".join(record).encode()
    except UnicodeEncodeError:
        return False
    return True


class _Records:
    """The records of a CSV file. A record that is none costs its first line; reading goes on with the next line.

    Attributes:
        width: fields of a record, or None to take any number; one with fewer is filled up.
        offset: bytes of the file up to the end of the last record.
    """

    def __init__(self, file, delimiter):
        self.file, self.delimiter = file, delimiter
        self.width = None
        self.offset = 0
        self.num_broken = 0
        self._again = deque()  # lines to parse once more
        self._taken = []  # lines of the record being parsed

    def go_to(self, offset):
        self.file.seek(offset)
        self.offset = offset
        self._again.clear()

    def blocks(self):
        """(offset, records, number of broken ones) of about `CSV_BLOCK_BYTES` at a time."""
        while block := self.file.read(CSV_BLOCK_BYTES):
            lines = (block + self.file.readline()).splitlines(keepends=True)
            start, self.num_broken = self.offset, 0
            records = self._at_once(lines)
            if records is None:
                self._again.extend(lines)
                records = list(self._until_again_is_empty())
            else:
                self.offset += sum(map(len, lines))
            yield start, records, self.num_broken

    def _at_once(self, lines):
        """The records of some lines, or None unless all is well with every one of them: this takes a fifth of the time."""
        try:
            texts = [line.decode("utf-8-sig") for line in lines[:1]] + [line.decode() for line in lines[1:]]
            records = list(filter(None, csv.reader(texts, delimiter=self.delimiter, strict=True)))
        except (UnicodeDecodeError, csv.Error):
            return None
        return records if all(len(record) == self.width for record in records) else None

    def _until_again_is_empty(self):
        for record in self:
            yield record
            if not self._again:
                return

    def _lines(self):
        while True:
            line = self._again.popleft() if self._again else self.file.readline()
            if not line:
                return
            if len(self._taken) >= MAX_ROW_LINES:
                self._again.appendleft(line)
                raise csv.Error("too many lines")
            self._taken.append(line)
            yield line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8", "surrogateescape")

    def __iter__(self):
        while True:
            reader = csv.reader(self._lines(), delimiter=self.delimiter, strict=True)
            try:
                for record in reader:
                    if self.width is not None and len(record) != self.width:
                        if len(record) > self.width or len(self._taken) > 1:
                            break
                        record += [""] * (self.width - len(record) if record else 0)
                    self._pass(len(self._taken))
                    if record:
                        yield record
                else:
                    return
            except csv.Error:
                pass
            record = self._without_quotes(self._taken[0])
            self._again.extendleft(reversed(self._taken[1:]))
            self._pass(1)
            if record is None:
                self.num_broken += 1
            else:
                yield record

    def _pass(self, num_lines):
        self.offset += sum(map(len, self._taken[:num_lines]))
        self._taken.clear()

    def _without_quotes(self, line):
        """The fields of a line in which quotes mean nothing, or None when it has not the right number of them."""
        fields = line.decode("utf-8", "surrogateescape").rstrip("\r\n").split(self.delimiter)
        return [field.strip('"') for field in fields] if len(fields) == self.width else None


def read_json_lines(file: BinaryIO, row: int, offset: int) -> Iterator[RowsBatch]:
    """Batches of a file with one JSON object a line. Arguments as for `read_csv`."""
    file.seek(offset)
    while block := file.read(JSON_BLOCK_BYTES):
        block += file.readline()
        batch = _json_batch(block.removeprefix(b"\xef\xbb\xbf"), row, offset)
        if batch is not None:
            yield batch
            row += batch.num_rows
        offset += len(block)


def _json_batch(block, row, offset):
    """The batch of some whole lines: as a table, or line by line when they are not all alike; None for blank lines."""
    import pyarrow.json

    if not block.strip():
        return None
    try:
        block.decode("utf-8")
        options = pyarrow.json.ReadOptions(block_size=len(block) + 1)
        return ArrowBatch(row, pyarrow.json.read_json(io.BytesIO(block), read_options=options), offset)
    except (UnicodeDecodeError, pyarrow.ArrowException):
        lines = [line for line in block.split(b"\n") if line.strip()]
        rows = [value for value in map(_json_object, lines) if value is not None]
        return RowsBatch(row, rows, offset=offset, num_broken=len(lines) - len(rows))


def _json_object(line):
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_json_list(file: BinaryIO, row: int, offset: int) -> Iterator[RowsBatch]:
    """The one batch of a file that is a JSON list of objects. Arguments as for `read_csv`."""
    values = json.load(file)
    rows = [value for value in values if isinstance(value, dict)]
    if row < len(rows):
        yield RowsBatch(0, rows, num_broken=len(values) - len(rows))


def read_parquet(file: BinaryIO, row: int, offset: int, is_remote: bool) -> Iterator["ParquetBatch"]:
    """Batches of a Parquet file.

    Args:
        file, row, offset: as for `read_csv`; the offset is not needed.
        is_remote: whether bytes cost less than requests for them: columns are then read whole, else in pieces.
    """
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=is_remote, buffer_size=0 if is_remote else 1 << 20)
    first = 0
    for number in range(parquet.num_row_groups):
        num_rows = parquet.metadata.row_group(number).num_rows
        group = _RowGroup(parquet, number)
        for start in range(0, num_rows, BATCH_ROWS):
            if first + start >= row:
                yield ParquetBatch(first + start, group, start, min(BATCH_ROWS, num_rows - start))
        first += num_rows


class ParquetBatch(RowsBatch):
    """A batch that reads its columns when they are asked for."""

    def __init__(self, row, group, start, num_rows):
        self.row, self.offset, self.num_rows, self.num_broken = row, 0, num_rows, 0
        self.names = group.parquet.schema_arrow.names
        self._group, self._start = group, start

    def sample(self):
        import pyarrow

        schema = self._group.parquet.schema_arrow
        large = {field.name for field in schema if _holds_files(field.type)}
        small = [name for name in schema.names if name not in large]
        batches = self._group.batches(small, SAMPLE_ROWS) if small else iter(())
        values = _sample_of(pyarrow.Table.from_batches([batch])) if (batch := next(batches, None)) is not None else {}
        return {name: [b""] if name in large else values.get(name, []) for name in schema.names}

    def image_columns(self):
        schema = self._group.parquet.schema_arrow
        try:
            features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
            return {name for name, feature in features.items() if feature.get("_type") == "Image"} & set(schema.names)
        except (KeyError, TypeError, ValueError, AttributeError):
            return set()

    def values(self, name):
        return self._group.cursor((name,)).rows(self._start, self.num_rows)[name].combine_chunks()

    def take(self, indices, names):
        cursor = self._group.cursor(tuple(names))
        for index in indices:
            (row,) = cursor.rows(self._start + index, 1).to_pylist()
            yield row


class _RowGroup:
    """A row group, whose columns are read side by side as far as they are needed."""

    def __init__(self, parquet, number):
        self.parquet = parquet
        self._number = number
        self._cursors = {}

    def batches(self, names, num_rows):
        return self.parquet.iter_batches(num_rows, row_groups=[self._number], columns=list(names))

    def cursor(self, names):
        if names not in self._cursors:
            schema = self.parquet.schema_arrow
            large = any(_holds_files(schema.field(name).type) for name in names)
            self._cursors[names] = _Cursor(self.batches(names, IMAGE_BATCH_ROWS if large else BATCH_ROWS))
        return self._cursors[names]


class _Cursor:
    """Rows of an iterator of batches, asked for in rising order."""

    def __init__(self, batches):
        self._batches = batches
        self._first = 0  # row number of the current batch
        self._batch = None

    def rows(self, start, num_rows):
        """Rows start to start + num_rows as an Arrow table."""
        import pyarrow

        parts = []
        while num_rows:
            while self._batch is None or self._first + self._batch.num_rows <= start:
                self._first += 0 if self._batch is None else self._batch.num_rows
                self._batch = next(self._batches)
            part = self._batch.slice(start - self._first, num_rows)
            parts.append(part)
            start, num_rows = start + part.num_rows, num_rows - part.num_rows
        return pyarrow.Table.from_batches(parts)


def _holds_files(kind):
    """Whether a column of this Arrow type may hold whole files."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(_holds_files(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind):
        return _holds_files(kind.value_type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _sample_of(table):
    table = table.slice(0, SAMPLE_ROWS)
    return {name: [v for v in table[name].to_pylist() if v is not None] for name in table.column_names}


class TableFile:
    """One file of a table.

    Args:
        name: its path or address.
        signature: changes when its content does.
        open_file: opens it for reading bytes.
        read: one of the functions above, its further arguments given.
    """

    def __init__(self, name: str, signature: object, open_file: Callable[[], BinaryIO], read: Callable):
        self.name, self.signature = name, signature
        self._open, self._read = open_file, read

    def batches(self, row: int, offset: int):
        """Its batches from a place on, (0, 0) for the start."""
        with self._open() as file:
            yield from self._read(file, row, offset)
