"""The files that `prepare` writes and every later stage reads: their names, schemas and readers.

PREPARED/sft.parquet            one row per supervised example
PREPARED/tokenizer/             a transformers tokenizer folder
PREPARED/pairs/pairs.parquet    one row per preference pair
PREPARED/pairs/responses.parquet  one row per distinct response under its prompt
PREPARED/pairs/feedback.parquet  one row per response that is desirable or not, where there is such feedback
PREPARED/suites/NAME/           pairs.parquet and responses.parquet of a suite, and rows.parquet (data/suites.py)
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache import Keys, KeySet, key_batches, key_bytes
from cache.key_set import key_array
from pipeline.errors import RequestError

KEY = pa.binary(16)
TOKENS = pa.list_(pa.int32())

SFT_SCHEMA = pa.schema(
    [
        pa.field("prompt_ids", TOKENS, nullable=False),
        pa.field("response_ids", TOKENS, nullable=False),
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("response_text", pa.string(), nullable=False),
    ]
)

RESPONSES_SCHEMA = pa.schema(
    [
        pa.field("response_key", KEY, nullable=False),
        pa.field("prompt_key", KEY, nullable=False),
        pa.field("split", pa.string(), nullable=False),  # "train" or "test"; a prompt is in one of them only
        pa.field("prompt_ids", TOKENS, nullable=False),
        pa.field("response_ids", TOKENS, nullable=False),  # with the end-of-turn token, unless truncated
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("response_text", pa.string(), nullable=False),
        pa.field("reward", pa.float32()),  # true or annotated reward, where the source has one
    ]
)

PAIRS_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.int32(), nullable=False),  # 0..n-1 in file order, over both splits
        pa.field("split", pa.string(), nullable=False),
        pa.field("prompt_key", KEY, nullable=False),
        pa.field("chosen_key", KEY, nullable=False),  # response_key of the chosen response
        pa.field("rejected_key", KEY, nullable=False),
        pa.field("category", pa.string()),
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("chosen_text", pa.string(), nullable=False),
        pa.field("rejected_text", pa.string(), nullable=False),
        pa.field("chosen_reward", pa.float32()),
        pa.field("rejected_reward", pa.float32()),
        pa.field("source", pa.string(), nullable=False),  # "file:line" or "dataset[row]"
    ]
)

FEEDBACK_SCHEMA = pa.schema(
    [
        pa.field("feedback_id", pa.int32(), nullable=False),  # 0..n-1 in file order, over both splits
        pa.field("split", pa.string(), nullable=False),
        pa.field("prompt_key", KEY, nullable=False),
        pa.field("response_key", KEY, nullable=False),
        pa.field("mismatched_key", KEY, nullable=False),  # of a response to another prompt, under this prompt
        pa.field("desirable", pa.bool_(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("response_text", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)

PAIR_SIDES = ["chosen_key", "rejected_key"]
FEEDBACK_SIDES = ["response_key", "mismatched_key"]


ROW_GROUP_ROWS = 2000


class TableWriter:
    """Writes Parquet as its rows come; the same rows give the same bytes, however they were cut."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", compression_level=3)
        self._waiting = schema.empty_table()
        self._empty = True

    def write(self, table: pa.Table) -> None:
        table = pa.concat_tables([self._waiting, table.cast(self._schema)])
        whole = table.num_rows - table.num_rows % ROW_GROUP_ROWS
        for start in range(0, whole, ROW_GROUP_ROWS):
            self._write(table.slice(start, ROW_GROUP_ROWS).combine_chunks())
        self._waiting = table.slice(whole).combine_chunks()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._waiting.num_rows or self._empty:
            self._write(self._waiting)
        self._writer.close()

    def _write(self, group: pa.Table) -> None:
        self._writer.write_table(group)
        self._empty = False


def write_table(table: pa.Table, path: Path, schema: pa.Schema) -> None:
    """Write `table` as Parquet. Row order is the caller's."""
    with TableWriter(path, schema) as writer:
        writer.write(table)


def read_sft(path: Path) -> pl.DataFrame:
    return _read(path, SFT_SCHEMA)


def scan_sft(path: Path) -> pl.LazyFrame:
    return _scan(path, SFT_SCHEMA)


def iter_sft(path: Path, columns: Sequence[str], *, rows: int) -> Iterator[pl.DataFrame]:
    """The supervised examples as `iter_responses` gives responses."""
    scan_sft(path)
    yield from map(pl.DataFrame, _batches(path, columns, rows))


def read_pairs(folder: Path, split: str | None = None, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """split, columns: None for all; other rows and columns take no memory."""
    scan_pairs(folder)
    return _read_part(folder / "pairs.parquet", split, columns or PAIRS_SCHEMA.names)


def read_responses(folder: Path, split: str | None = None, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """As `read_pairs`."""
    scan_responses(folder)
    return _read_part(folder / "responses.parquet", split, columns or RESPONSES_SCHEMA.names)


def _read_part(path: Path, split: str | None, columns: Sequence[str]) -> pl.DataFrame:
    if split is None:
        return pl.read_parquet(path, columns=list(columns), glob=False)
    # By pyarrow, whose filter copies: what polars keeps of a column of text holds that of the whole batch.
    parts = [
        batch.filter(pc.equal(batch["split"], split)).select(columns)
        for batch in _batches(path, list(dict.fromkeys([*columns, "split"])), ROW_GROUP_ROWS)
    ]
    return pl.DataFrame(pa.Table.from_batches(parts)) if parts else pl.read_parquet(path, glob=False).select(columns)


def scan_pairs(folder: Path) -> pl.LazyFrame:
    return _scan(folder / "pairs.parquet", PAIRS_SCHEMA)


def scan_responses(folder: Path) -> pl.LazyFrame:
    return _scan(folder / "responses.parquet", RESPONSES_SCHEMA)


def scan_feedback(folder: Path) -> pl.LazyFrame:
    """Raises RequestError where there is none."""
    file = folder / "feedback.parquet"
    if not file.exists():
        raise RequestError(
            f"{folder} holds no feedback, which objective kto reads: single responses with a label. Set "
            "prepare.feedback: true to split pairs into such rows (or give rows of prompt, completion, label), and run "
            "`dvc repro`."
        )
    return _scan(file, FEEDBACK_SCHEMA)


def scan_examples(folder: Path, split: str, *, feedback: bool) -> pl.LazyFrame:
    """What a policy trains on, in order, as two responses each, under the names of PAIR_SIDES: a pair's sides, or
    (feedback) a response and its mismatched one; with `id`, `source` and, of feedback, `desirable`."""
    rows = scan_feedback(folder) if feedback else scan_pairs(folder)
    sides = dict(zip(PAIR_SIDES, FEEDBACK_SIDES if feedback else PAIR_SIDES, strict=True))
    columns = [pl.col("feedback_id" if feedback else "pair_id").alias("id"), "source"]
    columns += [pl.col(column).alias(name) for name, column in sides.items()] + ["desirable"] * feedback
    return rows.filter(pl.col("split") == split).select(columns)


def name_examples(folder: Path, split: str, numbers: Sequence[int], *, feedback: bool = False) -> list[str]:
    """What people call examples that are numbered within their split: id and the line they come from."""
    rows = scan_examples(folder, split, feedback=feedback).select("id", "source").collect()
    what = "feedback" if feedback else "pair"
    return [f"{what} {number} ({source})" for number, source in rows[list(numbers)].iter_rows()]


def find_sources(folder: Path, keys: Keys) -> dict[bytes, list[str]]:
    """The input lines that the responses `keys` come from, each once, in file order; without those that have none.

    Memory holds the lines that are found.
    """
    wanted = KeySet(keys)
    tables = [("pairs.parquet", "pair_id", PAIR_SIDES), ("feedback.parquet", "feedback_id", FEEDBACK_SIDES)]
    found = list[tuple[int, int, bytes, str]]()  # (place, which side, key, line)
    for number, (name, place, sides) in enumerate(tables):
        if name == "pairs.parquet" or (folder / name).exists():
            _scan(folder / name, PAIRS_SCHEMA if number == 0 else FEEDBACK_SCHEMA)
            for batch in _batches(folder / name, [place, "source", *sides]):
                for side, column in enumerate(sides):
                    theirs = key_array(batch[column])
                    hits = np.flatnonzero(wanted.contains(theirs))
                    places, lines = (batch[of].take(pa.array(hits)).to_pylist() for of in (place, "source"))
                    which = [number * len(PAIR_SIDES) + side] * len(hits)
                    found += zip(places, which, key_bytes(theirs[hits]), lines, strict=True)
    sources = dict[bytes, dict[str, None]]()
    for *_, key, line in sorted(found):
        sources.setdefault(key, {})[line] = None
    return {key: list(lines) for key, lines in sources.items()}


def pair_sides(folder: Path) -> Iterator[pa.RecordBatch]:
    """The keys of each pair's two responses (PAIR_SIDES), in file order, some pairs at a time."""
    scan_pairs(folder)
    return key_batches(folder / "pairs.parquet", PAIR_SIDES)


def _batches(path: Path, columns: Sequence[str], rows: int = 1 << 16) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path, pre_buffer=False) as file:  # which would hold the columns of the whole file
        yield from file.iter_batches(rows, columns=list(columns))


def iter_responses(folder: Path, columns: Sequence[str], *, rows: int) -> Iterator[pl.DataFrame]:
    """The responses in file order, at most `rows` at a time, so that memory does not grow with the file."""
    scan_responses(folder)
    yield from map(pl.DataFrame, _batches(folder / "responses.parquet", columns, rows))


def _read(path: Path, schema: pa.Schema) -> pl.DataFrame:
    return _scan(path, schema).collect()


def _scan(path: Path, schema: pa.Schema) -> pl.LazyFrame:
    if not path.exists():
        raise RequestError(f"{path} does not exist; it is written by `refcache prepare` (run `dvc repro prepare`).")
    found = pq.read_schema(path)
    if found.names != schema.names:
        raise RequestError(
            f"{path} has columns {found.names}, expected {schema.names}. "
            "It comes from another version; run `dvc repro -f prepare`."
        )
    return pl.scan_parquet(path, glob=False)
