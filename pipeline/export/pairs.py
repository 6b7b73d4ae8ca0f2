"""The pairs of a split as one streamed table: texts, token ids, and what the reference cache holds for both sides."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache import CacheIncomplete, ReferenceView, join_rows, key_batches, key_bytes
from cache.key_set import key_array
from cache.view import list_column
from pipeline.data.tables import KEY, PAIR_SIDES, ROW_GROUP_ROWS, TOKENS, name_examples, scan_pairs
from pipeline.tokens.view import TokenView

LOGPS = pa.list_(pa.float32())
STORED = ["sum_logp", "token_logps"]  # of the cache, joined to each side

SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("chosen", pa.string(), nullable=False),
        pa.field("rejected", pa.string(), nullable=False),
        pa.field("chosen_reward", pa.float32()),
        pa.field("rejected_reward", pa.float32()),
        pa.field("prompt_ids", TOKENS, nullable=False),
        pa.field("chosen_ids", TOKENS, nullable=False),
        pa.field("rejected_ids", TOKENS, nullable=False),
        # Null where the cache has no row.
        pa.field("chosen_sum_logp", pa.float64()),
        pa.field("rejected_sum_logp", pa.float64()),
        pa.field("chosen_token_logps", LOGPS),
        pa.field("rejected_token_logps", LOGPS),
        *(pa.field(name, KEY, nullable=False) for name in ("prompt_key", *PAIR_SIDES)),
        *(pa.field(f"{name}_hex", pa.string(), nullable=False) for name in ("prompt_key", *PAIR_SIDES)),
    ]
)
RENAMED = {"prompt_text": "prompt", "chosen_text": "chosen", "rejected_text": "rejected"}


class Coverage(NamedTuple):
    """pairs: of the split; missing: those of them of which the cache lacks a side."""

    pairs: int
    missing: int


def coverage(folder: Path, split: str, view: ReferenceView, *, allow_missing: bool) -> Coverage:
    """Count the pairs of a split and those without both rows. Unless allowed, these raise CacheIncomplete."""
    scan_pairs(folder)  # says what is wrong with the file
    n_pairs, n_missing, first = 0, 0, None
    for batch in key_batches(folder / "pairs.parquet", ["split", *PAIR_SIDES]):
        of_split = batch.filter(pc.equal(batch["split"], split))
        keys = [key_array(of_split[side]) for side in PAIR_SIDES]
        absent = np.stack([view.keys.positions(column) < 0 for column in keys])
        lacking = absent.any(axis=0)
        if first is None and lacking.any():
            row = int(lacking.argmax())
            side = int(absent[:, row].argmax())
            first = n_pairs + row, PAIR_SIDES[side].removesuffix("_key"), key_bytes(keys[side][row : row + 1])[0]
        n_pairs, n_missing = n_pairs + of_split.num_rows, n_missing + int(lacking.sum())
    if first is not None and not allow_missing:
        row, name, key = first
        raise CacheIncomplete(
            f"{view.reference.place} lacks a response of {n_missing} of the {n_pairs} {split} pairs in {folder}; the "
            f"first is {name_examples(folder, split, [row])[0]}, its {name} response, key {key.hex()}. Nothing was "
            "written. Run `dvc repro score`, which computes only what is missing, or give --allow-missing for nulls in "
            "their place."
        )
    return Coverage(n_pairs, n_missing)


def joined_pairs(folder: Path, split: str, view: ReferenceView, tokens: TokenView) -> Iterator[pa.Table]:
    """The pairs of `split` in file order with SCHEMA, up to 2,000 at a time, which is what memory holds.

    tokens: of the same folder. What the cache lacks is null.
    """
    with pq.ParquetFile(folder / "pairs.parquet", pre_buffer=False) as file:
        for batch in file.iter_batches(ROW_GROUP_ROWS):
            of_split = batch.filter(pc.equal(batch["split"], split))
            if of_split.num_rows:
                yield _joined(of_split, view, tokens)


def _joined(batch: pa.RecordBatch, view: ReferenceView, tokens: TokenView) -> pa.Table:
    table = pa.table({RENAMED.get(name, name): batch[name] for name in batch.schema.names})
    keys = pl.DataFrame(batch.select(PAIR_SIDES))
    for name in PAIR_SIDES:
        keys = join_rows(keys, view, on=name, columns=STORED, prefix=name.removesuffix("key"), missing="null")
    for name in keys.columns[len(PAIR_SIDES) :]:
        table = table.append_column(name, keys[name].to_arrow())
    for name in PAIR_SIDES:
        sequences = tokens.gather(_rows(tokens, batch[name]))
        if name == PAIR_SIDES[0]:
            table = table.append_column("prompt_ids", list_column(sequences.prompts, TOKENS))
        table = table.append_column(name.replace("key", "ids"), list_column(sequences.responses, TOKENS))
    for name in ("prompt_key", *PAIR_SIDES):
        table = table.append_column(f"{name}_hex", [[key.hex() for key in batch[name].to_pylist()]])
    return table.select(SCHEMA.names).cast(SCHEMA)


def _rows(tokens: TokenView, keys: pa.Array) -> npt.NDArray[np.int64]:
    rows = tokens.rows_of(keys)
    assert (rows >= 0).all()  # prepare writes every response of a pair
    return rows
