"""Pairs, feedback and responses on disk between encoding and writing, so that no table of all rows is ever in memory.

Pairs and feedback lie in input order, responses in partitions by the first byte of their key; of all of them the keys
alone are held, some 50 bytes a pair. A partition is what is in memory when responses are made distinct and sorted.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.data.tables import FEEDBACK_SCHEMA, PAIRS_SCHEMA, RESPONSES_SCHEMA

PARTITIONS = 256
BUFFER_BYTES = 24 * 2**20  # responses in memory before they go to their partitions

_OWNER = pa.field("owner", pa.int64(), nullable=False)  # number of the pair, or -1 less the number of the feedback
_RESPONSES = pa.schema([*RESPONSES_SCHEMA, _OWNER])


class Kept(NamedTuple):
    """Which of the spooled rows stay: no training row of a test prompt, and of equal rows the first."""

    pairs: np.ndarray  # bool, (spooled pairs,)
    feedback: np.ndarray  # bool, (spooled rows of feedback,)
    keys: pl.DataFrame  # of the pairs that stay: their keys, `split`, `prompt_tokens`, `prompt_truncated`
    feedback_keys: pl.DataFrame  # likewise
    duplicates: int
    overlap: int  # training prompts that were left out because they are test prompts too


class _Lane:
    """Rows of one kind in input order, without their numbers."""

    def __init__(self, file: Path, schema: pa.Schema, keys: list[str], distinct: list[str]) -> None:
        self.file, self.number = file, schema.field(0)
        self.schema = pa.schema(list(schema)[1:])
        self.columns, self.distinct = [*keys, "split"], distinct
        self.count = 0
        self._writer = pa.ipc.new_file(file, self.schema, options=_options())
        empty = pl.DataFrame(self.schema.empty_table().select(self.columns))
        self._keys = [empty.with_columns(**prompt_counts([], []))]

    def add(self, columns: dict[str, Any], prompts: dict[str, pl.Series]) -> np.ndarray:
        """Returns the numbers of the rows."""
        table = pa.table(columns, schema=self.schema)
        self._writer.write_table(table)
        self._keys.append(pl.DataFrame(table.select(self.columns)).with_columns(**prompts))
        self.count += table.num_rows
        return np.arange(self.count - table.num_rows, self.count)

    def close(self) -> pl.DataFrame:
        self._writer.close()
        return pl.concat(self._keys).with_row_index("place")

    def rows(self, mask: np.ndarray) -> Iterator[pa.Table]:
        start = number = 0
        with pa.OSFile(str(self.file)) as file, pa.ipc.open_file(file) as reader:
            for i in range(reader.num_record_batches):
                batch = reader.get_batch(i)
                table = pa.table(batch).filter(pa.array(mask[start : start + batch.num_rows]))
                start += batch.num_rows
                numbers = pa.array(np.arange(number, number + table.num_rows), pa.int32())
                number += table.num_rows
                yield table.add_column(0, self.number, numbers)


class PairSpool:
    """Written by the `add` methods, then closed and read. `folder` must not exist yet."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        sides = ["chosen_key", "rejected_key"]
        self._pairs = _Lane(folder / "pairs.arrow", PAIRS_SCHEMA, ["prompt_key", *sides], sides)
        unpaired = ["response_key", "desirable"]
        self._feedback = _Lane(folder / "feedback.arrow", FEEDBACK_SCHEMA, ["prompt_key", *unpaired], unpaired)
        self._buffer: list[tuple[pa.Table, np.ndarray]] = []  # sorted by partition, and where each begins
        self._buffered = 0

    def add_pairs(self, pairs: dict[str, Any], responses: dict[str, Any], prompts: dict[str, pl.Series]) -> None:
        """A batch: columns of the pairs without their numbers; of twice as many responses, chosen and rejected in turn;
        and of `prompt_counts`."""
        self._buffer_responses(responses, self._pairs.add(pairs, prompts).repeat(2))

    def add_feedback(self, rows: dict[str, Any], responses: dict[str, Any], prompts: dict[str, pl.Series]) -> None:
        """Likewise; the responses are each row's and its mismatched one in turn."""
        self._buffer_responses(responses, -1 - self._feedback.add(rows, prompts).repeat(2))

    def _buffer_responses(self, columns: dict[str, Any], owners: np.ndarray) -> None:
        table = pa.table(columns | {"owner": owners}, schema=_RESPONSES)
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
                    pa.ipc.new_stream(file, _RESPONSES, options=_options()) as writer,
                ):
                    writer.write_table(table)
        self._buffer, self._buffered = [], 0

    def _partition(self, part: int) -> Path:
        return self._folder / f"responses-{part:02x}.arrow"

    def close(self) -> Kept:
        """Which rows stay; no more is added."""
        self._flush()
        lanes = (self._pairs, self._feedback)
        keys = [lane.close() for lane in lanes]
        tests = pl.concat([table.filter(split="test")["prompt_key"] for table in keys]).unique().implode()
        overlap = (pl.col("split") == "train") & pl.col("prompt_key").is_in(tests)
        apart = [table.filter(~overlap) for table in keys]
        distinct = [
            table.unique(lane.distinct, keep="first", maintain_order=True)
            for lane, table in zip(lanes, apart, strict=True)
        ]
        masks = [np.zeros(lane.count, dtype=bool) for lane in lanes]
        for mask, table in zip(masks, distinct, strict=True):
            mask[table["place"].to_numpy()] = True
        removed = pl.concat([table.filter(overlap)["prompt_key"] for table in keys]).n_unique()
        duplicates = sum(len(a) - len(b) for a, b in zip(apart, distinct, strict=True))
        return Kept(masks[0], masks[1], distinct[0], distinct[1], duplicates, removed)

    def pairs(self, kept: Kept) -> Iterator[pa.Table]:
        """The pairs that stay, numbered, in input order."""
        return self._pairs.rows(kept.pairs)

    def feedback(self, kept: Kept) -> Iterator[pa.Table]:
        return self._feedback.rows(kept.feedback)

    def responses(self, kept: Kept) -> Iterator[pa.Table]:
        """One row per response key of the rows that stay, by partition, sorted by key.

        Text and split are those of the first row that has the response; so is the reward, of the first that has one.
        """
        for part in range(PARTITIONS):
            path = self._partition(part)
            if path.exists():
                table = _read(path)
                owners = table["owner"].to_numpy()
                stays = np.concatenate([kept.pairs, kept.feedback[::-1]])[owners]  # negative ones count from the end
                table = table.filter(pa.array(stays)).combine_chunks()
                if table.num_rows:
                    yield _distinct(table)


def prompt_counts(tokens: list[int], truncated: list[bool]) -> dict[str, pl.Series]:
    """Columns that only counts are made of, one row per pair or row of feedback."""
    return {
        "prompt_tokens": pl.Series(tokens, dtype=pl.Int32),
        "prompt_truncated": pl.Series(truncated, dtype=pl.Boolean),
    }


def _distinct(table: pa.Table) -> pa.Table:
    keys = pl.DataFrame(table.select(["response_key", "reward"])).with_row_index("row")
    first = keys.unique("response_key", keep="first", maintain_order=True).sort("response_key")
    rewarded = keys.drop_nulls("reward").unique("response_key", keep="first", maintain_order=True)
    rewards = first.join(rewarded, on="response_key", how="left", maintain_order="left")["reward_right"]
    found = table.take(pa.array(first["row"].to_numpy())).drop_columns(["owner"])
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
