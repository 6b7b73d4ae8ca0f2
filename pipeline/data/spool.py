"""Pairs, feedback and responses on disk between encoding and writing, so that no table of all rows is ever in memory.

Pairs and feedback lie in input order, responses in partitions by the first byte of their key; of all of them the keys
alone are held, some 50 bytes a pair. A partition is what is in memory when responses are made distinct and sorted.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.data.tables import FEEDBACK_SCHEMA, PAIRS_SCHEMA, RESPONSES_SCHEMA

PARTITION_ROWS = 800  # input rows whose responses are about one partition
BUFFER_BYTES = 4 * 2**20  # responses in memory before they go to their partitions

_OWNER = pa.field("owner", pa.int64(), nullable=False)  # number of the pair, or -1 less the number of the feedback
_RESPONSES = pa.schema([*RESPONSES_SCHEMA, _OWNER])


class _Lane(NamedTuple):
    """One kind of rows: its table, and which columns of it are keys."""

    name: str
    schema: pa.Schema
    keys: list[str]
    distinct: list[str]  # rows that are equal in these are one

    @property
    def spooled(self) -> pa.Schema:
        """Without the numbers, which come last."""
        return pa.schema(list(self.schema)[1:])


_PAIRS = _Lane("pairs", PAIRS_SCHEMA, ["prompt_key", "chosen_key", "rejected_key"], ["chosen_key", "rejected_key"])
_UNPAIRED = ["response_key", "desirable"]
_FEEDBACK = _Lane("feedback", FEEDBACK_SCHEMA, ["prompt_key", *_UNPAIRED], _UNPAIRED)


class PairSpool:
    """Written by the `add` methods, then finished. `folder` must not exist yet."""

    def __init__(self, folder: Path, partitions: int) -> None:
        """partitions: of the responses, 1 to 256, the same for all spools that are read together."""
        folder.mkdir(parents=True)
        self._folder, self._partitions = folder, partitions
        self._pairs, self._feedback = (_LaneWriter(lane, folder) for lane in (_PAIRS, _FEEDBACK))
        self._buffer: list[tuple[pa.Table, np.ndarray]] = []  # sorted by partition, and where each begins
        self._buffered = 0

    def add_pairs(self, pairs: dict[str, Any], responses: dict[str, Any], prompts: dict[str, pl.Series]) -> None:
        """A batch: columns of the pairs without their numbers; of twice as many responses, chosen and rejected in turn;
        and of `prompt_counts`."""
        self._buffer_responses(responses, self._pairs.add(pairs, prompts).repeat(2))

    def add_feedback(self, rows: dict[str, Any], responses: dict[str, Any], prompts: dict[str, pl.Series]) -> None:
        """Likewise; the responses are each row's and its mismatched one in turn."""
        self._buffer_responses(responses, -1 - self._feedback.add(rows, prompts).repeat(2))

    def finish(self) -> None:
        self._flush()
        self._pairs.finish()
        self._feedback.finish()

    def _buffer_responses(self, columns: dict[str, Any], owners: np.ndarray) -> None:
        table = pa.table(columns | {"owner": owners}, schema=_RESPONSES)
        first = np.frombuffer(b"".join(table["response_key"].to_pylist()), np.uint8).reshape(-1, 16)[:, 0]
        parts = first.astype(np.int64) * self._partitions // 256
        order = np.argsort(parts, kind="stable")
        starts = np.searchsorted(parts[order], np.arange(self._partitions + 1))
        self._buffer.append((table.take(order), starts))
        self._buffered += table.nbytes
        if self._buffered > BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        for part in range(self._partitions):
            pieces = [table.slice(s[part], s[part + 1] - s[part]) for table, s in self._buffer if s[part] < s[part + 1]]
            if pieces:
                table = pa.concat_tables(pieces).combine_chunks()
                with (
                    _partition(self._folder, part).open("ab") as file,
                    pa.ipc.new_stream(file, _RESPONSES, options=_options()) as writer,
                ):
                    writer.write_table(table)
        self._buffer, self._buffered = [], 0


class _LaneWriter:
    def __init__(self, lane: _Lane, folder: Path) -> None:
        self._lane, self._folder = lane, folder
        self._count = 0
        self._writer = pa.ipc.new_file(folder / f"{lane.name}.arrow", lane.spooled, options=_options())
        columns = [*lane.keys, "split"]
        empty = pl.DataFrame(lane.spooled.empty_table().select(columns))
        self._keys = [empty.with_columns(**prompt_counts([], []))]

    def add(self, columns: dict[str, Any], prompts: dict[str, pl.Series]) -> np.ndarray:
        """Returns the numbers of the rows within this spool."""
        table = pa.table(columns, schema=self._lane.spooled)
        self._writer.write_table(table)
        self._keys.append(pl.DataFrame(table.select([*self._lane.keys, "split"])).with_columns(**prompts))
        self._count += table.num_rows
        return np.arange(self._count - table.num_rows, self._count)

    def finish(self) -> None:
        self._writer.close()
        pl.concat(self._keys).write_ipc(self._folder / f"{self._lane.name}-keys.arrow")


class Kept(NamedTuple):
    """Which of the spooled rows stay: no training row of a test prompt, and of equal rows the first."""

    pairs: np.ndarray  # bool, (spooled pairs,)
    feedback: np.ndarray  # bool, (spooled rows of feedback,)
    keys: pl.DataFrame  # of the pairs that stay: their keys, `split`, `prompt_tokens`, `prompt_truncated`
    feedback_keys: pl.DataFrame  # likewise
    duplicates: int
    overlap: int  # training prompts that were left out because they are test prompts too


class Spooled:
    """The rows of finished spools, one after the other."""

    def __init__(self, folders: Sequence[Path], partitions: int) -> None:
        self._folders, self._partitions = folders, partitions
        keys = {lane: self._keys(lane) for lane in (_PAIRS.name, _FEEDBACK.name)}
        self._starts = {name: np.cumsum([0, *map(len, tables)]) for name, tables in keys.items()}
        self.kept = _kept(*(pl.concat(tables) for tables in keys.values()))

    def _keys(self, name: str) -> list[pl.DataFrame]:
        return [pl.read_ipc(folder / f"{name}-keys.arrow") for folder in self._folders]

    def pairs(self) -> Iterator[pa.Table]:
        """The pairs that stay, numbered, in input order."""
        return self._rows(_PAIRS, self.kept.pairs)

    def feedback(self) -> Iterator[pa.Table]:
        return self._rows(_FEEDBACK, self.kept.feedback)

    def _rows(self, lane: _Lane, mask: np.ndarray) -> Iterator[pa.Table]:
        start = number = 0
        for folder in self._folders:
            with pa.OSFile(str(folder / f"{lane.name}.arrow")) as file, pa.ipc.open_file(file) as reader:
                for i in range(reader.num_record_batches):
                    batch = reader.get_batch(i)
                    table = pa.table(batch).filter(pa.array(mask[start : start + batch.num_rows]))
                    start += batch.num_rows
                    numbers = pa.array(np.arange(number, number + table.num_rows), pa.int32())
                    number += table.num_rows
                    yield table.add_column(0, lane.schema.field(0), numbers)

    def responses(self) -> Iterator[pa.Table]:
        """One row per response key of the rows that stay, by partition, sorted by key.

        Text and split are those of the first row that has the response; so is the reward, of the first that has one.
        """
        for part in range(self._partitions):
            tables = [
                self._staying(_read(_partition(folder, part)), place)
                for place, folder in enumerate(self._folders)
                if _partition(folder, part).exists()
            ]
            if any(table.num_rows for table in tables):
                yield _distinct(pa.concat_tables(tables).combine_chunks())

    def _staying(self, table: pa.Table, place: int) -> pa.Table:
        owners = table["owner"].to_numpy()
        stays = np.zeros(len(owners), dtype=bool)
        of_pairs = owners >= 0
        stays[of_pairs] = self.kept.pairs[owners[of_pairs] + self._starts["pairs"][place]]
        stays[~of_pairs] = self.kept.feedback[-1 - owners[~of_pairs] + self._starts["feedback"][place]]
        return table.filter(pa.array(stays))


def partitions_for(rows: int) -> int:
    """Such that one is as large of few rows as of many."""
    return min(256, max(1, rows // PARTITION_ROWS))


def _kept(*keys: pl.DataFrame) -> Kept:
    tests = pl.concat([table.filter(split="test")["prompt_key"] for table in keys]).unique().implode()
    overlap = (pl.col("split") == "train") & pl.col("prompt_key").is_in(tests)
    apart = [table.with_row_index("place").filter(~overlap) for table in keys]
    distinct = [
        table.unique(lane.distinct, keep="first", maintain_order=True)
        for lane, table in zip((_PAIRS, _FEEDBACK), apart, strict=True)
    ]
    masks = [np.zeros(len(table), dtype=bool) for table in keys]
    for mask, table in zip(masks, distinct, strict=True):
        mask[table["place"].to_numpy()] = True
    removed = pl.concat([table.filter(overlap)["prompt_key"] for table in keys]).n_unique()
    duplicates = sum(len(a) - len(b) for a, b in zip(apart, distinct, strict=True))
    return Kept(masks[0], masks[1], distinct[0], distinct[1], duplicates, removed)


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


def _partition(folder: Path, part: int) -> Path:
    return folder / f"responses-{part:02x}.arrow"


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
