"""Read input rows from JSONL, Parquet or a `datasets` dataset, each with the place it came from.

A row that cannot be read is yielded as BadRow, so that the caller can report all of them together; a file or dataset
that cannot be read at all raises RequestError.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RequestError
from pipeline.params import HubParams

EXTENSIONS = (".jsonl", ".parquet")
BATCH_ROWS = 1000


class Row(NamedTuple):
    where: str  # "file:line" from 1, or "file[row]" from 0
    values: dict[str, Any]


class BadRow(NamedTuple):
    where: str
    reason: str


def read_file(folder: Path, name: str) -> Iterator[Row | BadRow]:
    """The rows of `folder / name` in file order; blank lines of JSONL are passed over.

    Raises RequestError for a missing or empty file, an unknown extension, or a broken Parquet file.
    """
    path = folder / name
    if path.suffix not in EXTENSIONS:
        raise RequestError(
            f"{path}: unknown extension {path.suffix!r}; prepare reads {' and '.join(EXTENSIONS)} files."
        )
    if not path.is_file():
        raise RequestError(
            f"{path} does not exist. Files are looked for in prepare.input; it holds {_listing(folder)}."
        )
    reader = _jsonl_rows if path.suffix == ".jsonl" else _parquet_rows
    found = False
    for row in reader(path, name):
        found = True
        yield row
    if not found:
        raise RequestError(f"{path} is empty; expected at least one row.")


def read_dataset(params: HubParams, split: str, folder: Path) -> Iterator[Row | BadRow]:
    """The rows of one split of a hub dataset, or of a local dataset folder (under `folder` or the working directory).

    Raises RequestError for an unknown dataset, config or split, an unreachable hub, or an empty dataset.
    """
    dataset = _load_dataset(params, split, folder)
    start = 0
    for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
        yield from _table_rows(table, f"{params.dataset}:{split}", start)
        start += table.num_rows


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return f"nothing: there is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir() if path.suffix in EXTENSIONS)
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "no .jsonl or .parquet file"


def _jsonl_rows(path: Path, name: str) -> Iterator[Row | BadRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{name}:{number}"
                try:
                    yield Row(where, _parse_line(line.rstrip(b"\r\n")))
                except _Unreadable as error:
                    yield BadRow(where, str(error))


class _Unreadable(ValueError):
    """Why one line is no row."""


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unreadable(f"invalid UTF-8 at byte {error.start} of the line (0x{line[error.start]:02x})") from None
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            # JSON can spell half of a surrogate pair; no tokenizer and no Parquet file can take it.
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _Unreadable(f"invalid JSON at column {error.colno}: {error.msg}") from None
    except UnicodeEncodeError:
        raise _Unreadable("invalid Unicode: an escape \\ud800 to \\udfff stands alone") from None
    except RecursionError:
        raise _Unreadable("invalid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise _Unreadable(f"expected a JSON object, found {type(value).__name__}")
    return value


def _parquet_rows(path: Path, name: str) -> Iterator[Row | BadRow]:
    try:
        with pq.ParquetFile(path) as file:
            start = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from _table_rows(batch, name, start)
                start += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{path} is not a readable Parquet file: {error}") from None


def _table_rows(table: pa.Table | pa.RecordBatch, name: str, start: int) -> Iterator[Row | BadRow]:
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:
        yield from _rows_one_by_one(table, name, start)
        return
    for offset, values in enumerate(rows):
        yield Row(f"{name}[{start + offset}]", values)


def _rows_one_by_one(table: pa.Table | pa.RecordBatch, name: str, start: int) -> Iterator[Row | BadRow]:
    """Slower: finds which rows of a batch hold invalid UTF-8, which writers do not check."""
    for offset in range(table.num_rows):
        where = f"{name}[{start + offset}]"
        try:
            yield Row(where, table.slice(offset, 1).to_pylist()[0])
        except UnicodeDecodeError as error:
            yield BadRow(where, f"invalid UTF-8 in a text column (0x{error.object[error.start]:02x})")


def _load_dataset(params: HubParams, split: str, folder: Path) -> Any:
    import sys

    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # The input folder first: it is the one that DVC watches.
    local = next((path for path in (folder / params.dataset, Path(params.dataset)) if path.is_dir()), None)
    try:
        if local is None:
            return datasets.load_dataset(params.dataset, params.config, split=split, revision=params.revision)
        if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
            return _saved_split(datasets.load_from_disk(str(local)), params, split)
        return datasets.load_dataset(str(local), params.config, split=split)
    except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:  # IndexError: saved empty
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"dataset {params.dataset} (config {params.config}, split {split!r}) could not be loaded: {error}\n"
            "prepare.hub needs the id of a dataset on the hub and a network (or its copy in the Hugging Face cache), "
            "or a local folder; for gated datasets log in first."
        ) from None


def _saved_split(saved: Any, params: HubParams, split: str) -> Any:
    import datasets

    if not isinstance(saved, datasets.DatasetDict):
        if saved.split is not None and str(saved.split) != split:
            raise RequestError(f"{params.dataset} holds the one split {str(saved.split)!r}, params name {split!r}.")
        return saved
    if split not in saved:
        raise RequestError(f"{params.dataset} has no split {split!r}; it has {', '.join(sorted(saved))}.")
    return saved[split]
