"""Pairs and responses on disk between encoding and writing, so that no table of all rows is ever in memory.

Pairs lie in input order, responses in partitions by the first byte of their key; of either the keys alone are held, 50
bytes a pair. A partition is what is in memory when responses are made distinct and sorted.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.data.tables import PAIRS_SCHEMA, RESPONSES_SCHEMA

PARTITIONS = 256
BUFFER_BYTES = 24 * 2**20  # responses in memory before they go to their partitions

_PAIRS = pa.schema([field for field in PAIRS_SCHEMA if field.name != "pair_id"])
_RESPONSES = pa.schema([*RESPONSES_SCHEMA, pa.field("pair", pa.int64(), nullable=False)])
_KEYS = ["prompt_key", "chosen_key", "rejected_key"]


class Kept(NamedTuple):
    """Which of the spooled pairs stay."""

    mask: np.ndarray  # bool, (spooled pairs,)
    keys: pl.DataFrame  # of those that stay: the three keys and `split`, `prompt_tokens`, `prompt_truncated`
    duplicates: int
    overlap: int  # training prompts that were left out because they are test prompts too


class PairSpool:
    """Written by `add`, then read once by `pairs` and once by `responses`. `folder` must not exist yet."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._pairs = pa.ipc.new_file(folder / "pairs.arrow", _PAIRS, options=_options())
        self._keys: list[pl.DataFrame] = []
        self._count = 0
        self._buffer: list[tuple[pa.Table, np.ndarray]] = []  # sorted by partition, and where each begins
        self._buffered = 0

    def add(self, pairs: dict[str, Any], responses: dict[str, Any], prompts: dict[str, Any]) -> None:
        """A batch: columns of the pairs without their numbers; of twice as many responses, chosen and rejected in turn;
        and of each pair's prompt the columns that only counts are made of."""
        table = pa.table(pairs, schema=_PAIRS)
        self._pairs.write_table(table)
        self._keys.append(pl.DataFrame(table.select([*_KEYS, "split"])).with_columns(**prompts))
        numbers = np.arange(self._count, self._count + table.num_rows).repeat(2)
        self._count += table.num_rows
        self._buffer_responses(pa.table(responses | {"pair": numbers}, schema=_RESPONSES))

    def _buffer_responses(self, table: pa.Table) -> None:
        first = np.frombuffer(b"".join(table["response_key"].to_pylist()), np.uint8).reshape(-1, 16)[:, 0]
        order = np.argsort(first, kind="stable")
        starts = np.searchsorted(first[order], np.arange(PARTITIONS + 1))
        self._buffer.append((table.take(order), starts))
        self._buffered += table.nbytes
        if self._buffered > BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        for part in range(PARTITIONS):
            pieces = [table.slice(s[part], s[part + 1] - s[part]) for table, s in self._buffer if s[part] < s[part + 1]]
            if pieces:
                table = pa.concat_tables(pieces).combine_chunks()
                with (
                    self._partition(part).open("ab") as file,
                    pa.ipc.new_stream(file, _RESPONSES, options=_options()) as to,
                ):
                    to.write_table(table)
        self._buffer, self._buffered = [], 0

    def _partition(self, part: int) -> Path:
        return self._folder / f"responses-{part:02x}.arrow"

    def close(self) -> Kept:
        """No more is added; which pairs stay: no training pair of a test prompt, and of equal pairs the first."""
        self._flush()
        self._pairs.close()
        empty = {name: pa.array([], _PAIRS.field(name).type) for name in [*_KEYS, "split"]}
        counts = {"prompt_tokens": pl.Series([], dtype=pl.Int32), "prompt_truncated": pl.Series([], dtype=pl.Boolean)}
        keys = pl.concat(self._keys) if self._keys else pl.DataFrame(empty).with_columns(**counts)
        self._keys = []
        keys = keys.with_row_index("pair")
        tests = keys.filter(split="test")["prompt_key"].unique()
        overlap = (pl.col("split") == "train") & pl.col("prompt_key").is_in(tests.implode())
        apart = keys.filter(~overlap)
        distinct = apart.unique(["chosen_key", "rejected_key"], keep="first", maintain_order=True)
        mask = np.zeros(self._count, dtype=bool)
        mask[distinct["pair"].to_numpy()] = True
        removed = keys.filter(overlap)["prompt_key"].n_unique()
        return Kept(mask, distinct.drop("pair"), apart.height - distinct.height, removed)

    def pairs(self, kept: Kept) -> Iterator[pa.Table]:
        """The pairs that stay, numbered, in input order."""
        start = number = 0
        with pa.OSFile(str(self._folder / "pairs.arrow")) as file, pa.ipc.open_file(file) as reader:
            for i in range(reader.num_record_batches):
                batch = reader.get_batch(i)
                table = pa.table(batch).filter(pa.array(kept.mask[start : start + batch.num_rows]))
                start += batch.num_rows
                numbers = pa.array(np.arange(number, number + table.num_rows), pa.int32())
                number += table.num_rows
                yield table.add_column(0, PAIRS_SCHEMA.field("pair_id"), numbers)

    def responses(self, kept: Kept) -> Iterator[pa.Table]:
        """One row per response key of the pairs that stay, by partition, sorted by key.

        Text and split are those of the first pair that has the response; so is the reward, of the first that has one.
        """
        for part in range(PARTITIONS):
            path = self._partition(part)
            if path.exists():
                table = _read(path)
                table = table.filter(pa.array(kept.mask[table["pair"].to_numpy()])).combine_chunks()
                if table.num_rows:
                    yield _distinct(table)


def _distinct(table: pa.Table) -> pa.Table:
    keys = pl.DataFrame(table.select(["response_key", "reward"])).with_row_index("row")
    first = keys.unique("response_key", keep="first", maintain_order=True).sort("response_key")
    rewarded = keys.drop_nulls("reward").unique("response_key", keep="first", maintain_order=True)
    rewards = first.join(rewarded, on="response_key", how="left", maintain_order="left")["reward_right"]
    found = table.take(pa.array(first["row"].to_numpy())).drop_columns(["pair"])
    place = found.schema.get_field_index("reward")
    return found.set_column(place, RESPONSES_SCHEMA.field("reward"), rewards.to_arrow().cast(pa.float32()))


def _read(path: Path) -> pa.Table:
    """All streams that were appended to a file, one after the other."""
    tables = []
    with pa.OSFile(str(path)) as file:
        while file.tell() < file.size():
            with pa.ipc.open_stream(file) as reader:
                tables.append(reader.read_all())
    return pa.concat_tables(tables)


def _options() -> Any:
    return pa.ipc.IpcWriteOptions(compression="lz4")
