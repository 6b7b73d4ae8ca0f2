"""Rows of files: JSON lines and arrays, CSV, Parquet, compressed or not, by name, pattern or folder; all streamed."""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from json.decoder import WHITESPACE  # type: ignore[attr-defined]  # what json itself skips
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RequestError

READ = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
COMPRESSED = (".gz", ".zst")
BATCH_ROWS = 1000
_CHUNK = 1 << 16  # characters of a JSON array that are looked at together
_LARGEST = 1 << 28  # characters of one element of such an array


class Row(NamedTuple):
    where: str  # "file:line" from 1, or "file[row]" from 0
    values: dict[str, Any]


class BadRow(NamedTuple):
    where: str
    reason: str


def find_files(folder: Path, name: str) -> list[str]:
    """The files that `name` means, relative to `folder` and sorted: one, those of a pattern (*.jsonl), or of a folder.

    Raises RequestError where there is none.
    """
    path = folder / name
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file() and _kind(file) in READ]
    elif any(mark in name for mark in "*?["):
        found = sorted(file for file in folder.glob(name) if file.is_file())
    else:
        return [name]
    if not found:
        raise RequestError(
            f"{path} matches no file that prepare reads ({_extensions()}). Files are looked for in prepare.input, "
            f"which holds {_listing(folder)}."
        )
    return [file.relative_to(folder).as_posix() for file in found]


def read_file(folder: Path, name: str) -> Iterator[Row | BadRow]:
    """The rows of `folder / name` in file order; blank lines are passed over.

    Raises RequestError for a missing or empty file, an unknown extension, or a file that can't be read as what it says.
    """
    path = folder / name
    kind = _kind(path)
    if kind not in READ:
        raise RequestError(f"{path}: unknown extension {path.suffix!r}; prepare reads {_extensions()}.")
    if not path.is_file():
        raise RequestError(
            f"{path} does not exist. Files are looked for in prepare.input; it holds {_listing(folder)}."
        )
    found = False
    for row in _rows(path, kind, name):
        found = True
        yield row
    if not found:
        raise RequestError(f"{path} is empty; expected at least one row.")


def count_rows(folder: Path, name: str) -> int:
    """About how many rows `folder / name` has, for a progress bar; 0 for a file that can't be read, as readers say."""
    path = folder / name
    kind = _kind(path)
    try:
        if kind == ".parquet":
            return int(pq.read_metadata(path).num_rows)
        with _open(path) as file:
            if kind != ".csv" and not _is_array(file):
                return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK), b""))
        return sum(1 for _ in read_file(folder, name))
    except (OSError, EOFError, pa.ArrowException, RequestError):
        return 0


def table_rows(table: pa.Table | pa.RecordBatch, name: str, start: int) -> Iterator[Row | BadRow]:
    """The rows of an Arrow table, the first of which is number `start` of `name`; columns of JSON text are decoded."""
    decoders = {field.name: decoder for field in table.schema if (decoder := _decoder(field.type)) is not None}
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:
        yield from _rows_one_by_one(table, name, start)
        return
    for offset, values in enumerate(rows):
        where = f"{name}[{start + offset}]"
        try:
            for column, decode in decoders.items():
                values[column] = decode(values[column])
        except ValueError as error:
            yield BadRow(where, f"invalid JSON in column {column}: {error}")
        else:
            yield Row(where, values)


def _kind(path: Path) -> str:
    suffixes = path.suffixes
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in COMPRESSED else path.suffix


def _extensions() -> str:
    return f"{', '.join(READ)}, each also with {' or '.join(COMPRESSED)}"


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return f"nothing: there is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() or _kind(path) in READ)
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "no file that prepare reads"


def _rows(path: Path, kind: str, name: str) -> Iterator[Row | BadRow]:
    if kind == ".parquet":
        yield from _parquet_rows(path, name)
        return
    try:
        with _open(path) as file:
            if kind == ".csv":
                yield from _csv_rows(file, name)
            elif _is_array(file):
                yield from _array_rows(io.TextIOWrapper(file, "utf-8-sig"), name)
            else:
                yield from _jsonl_rows(file, name)
    except (EOFError, OSError, pa.ArrowException, csv.Error) as error:
        raise RequestError(f"{path} can't be read as {kind[1:]}: {error}") from None


def _open(path: Path) -> io.BufferedReader:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path))
    if path.suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _is_array(file: io.BufferedReader) -> bool:
    return file.peek(_CHUNK)[:_CHUNK].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _jsonl_rows(file: io.BufferedReader, name: str) -> Iterator[Row | BadRow]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            where = f"{name}:{number}"
            try:
                yield Row(where, _parse_line(line.rstrip(b"\r\n")))
            except _Unreadable as error:
                yield BadRow(where, str(error))


def _array_rows(file: io.TextIOWrapper, name: str) -> Iterator[Row | BadRow]:
    """One element at a time. Raises RequestError where the array itself is broken, since nothing after that is sure."""
    decoder, text, number = json.JSONDecoder(), "", 0
    text = file.read(_CHUNK).lstrip().removeprefix("[")
    while True:
        text = text[WHITESPACE.match(text).end() :].removeprefix(",").lstrip()
        if text.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(text)
            if end == len(text):  # a number may go on
                raise json.JSONDecodeError("cut", text, end)
        except json.JSONDecodeError as error:
            more = file.read(max(_CHUNK, len(text)))
            if not more or len(text) > _LARGEST:
                reason = "it ends before its array does" if not more else error.msg
                raise RequestError(f"{name}[{number}]: not readable as an array of JSON objects: {reason}") from None
            text += more
            continue
        where = f"{name}[{number}]"
        try:
            yield Row(where, _checked(value, text[:end]))
        except _Unreadable as error:
            yield BadRow(where, str(error))
        text, number = text[end:], number + 1


def _csv_rows(file: io.BufferedReader, name: str) -> Iterator[Row | BadRow]:
    reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    for values in reader:
        where = f"{name}:{reader.line_num}"
        if None in values or None in values.values():
            yield BadRow(where, f"another number of cells than the heading has ({len(reader.fieldnames or ())})")
        else:
            yield Row(where, {column: value or None for column, value in values.items()})


class _Unreadable(ValueError):
    """Why one line is no row."""


def _checked(value: Any, text: str) -> dict[str, Any]:
    """`value`, which `text` spells, as a row."""
    if not isinstance(value, dict):
        raise _Unreadable(f"expected a JSON object, found {type(value).__name__}")
    if "\\ud" in text.lower():
        # JSON can spell half of a surrogate pair; no tokenizer and no Parquet file can take it.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _Unreadable("invalid Unicode: an escape \\ud800 to \\udfff stands alone") from None
    return value


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unreadable(f"invalid UTF-8 at byte {error.start} of the line (0x{line[error.start]:02x})") from None
    try:
        return _checked(json.loads(text), text)
    except json.JSONDecodeError as error:
        raise _Unreadable(f"invalid JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise _Unreadable("invalid JSON: nested too deeply") from None


def _parquet_rows(path: Path, name: str) -> Iterator[Row | BadRow]:
    try:
        with pq.ParquetFile(path) as file:
            start = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from table_rows(batch, name, start)
                start += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{path} is not a readable Parquet file: {error}") from None


def _rows_one_by_one(table: pa.Table | pa.RecordBatch, name: str, start: int) -> Iterator[Row | BadRow]:
    """Slower: finds which rows of a batch hold invalid UTF-8, which writers do not check."""
    for offset in range(table.num_rows):
        try:
            table.slice(offset, 1).to_pylist()
        except UnicodeDecodeError as error:
            where = f"{name}[{start + offset}]"
            yield BadRow(where, f"invalid UTF-8 in a text column (0x{error.object[error.start]:02x})")
        else:
            yield from table_rows(table.slice(offset, 1), name, start + offset)


def _decoder(kind: pa.DataType) -> Any:
    """What turns a value of this Arrow type into what its JSON says; None where there is no JSON in it.

    datasets writes columns of mixed forms so, also within lists and structs.
    """
    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _decoder(kind.value_type)
        return inner and (lambda value: value and [inner(item) for item in value])
    if pa.types.is_struct(kind):
        parts = {field.name: part for field in kind if (part := _decoder(field.type)) is not None}
        if parts:
            return lambda value: value and value | {name: part(value[name]) for name, part in parts.items()}
    return None
