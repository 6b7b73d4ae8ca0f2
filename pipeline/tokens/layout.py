"""How token ids lie in a view's files, and how they get there in memory that follows neither responses nor prompts."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from cache.key_set import KEY, key_array
from cache.schema import KEY_COLUMN
from cache.spill import KEY_BITS, Spill, spill_folder
from pipeline.data.tables import iter_responses
from pipeline.workspace import scratch_folder

VIEW_VERSION = 1  # enters the view's name, so that a view of another layout is never opened
# Little-endian, without a header. *_starts: where each one's ids begin, and where the last one's end, (n + 1,).
FILES: dict[str, np.dtype[Any]] = {
    "response_keys": KEY,
    "train": np.dtype(np.bool_),
    "prompt_numbers": np.dtype(np.int32),
    "response_starts": np.dtype(np.int64),
    "response_ids": np.dtype(np.int32),
    "prompt_keys": KEY,
    "prompt_starts": np.dtype(np.int64),
    "prompt_ids": np.dtype(np.int32),
}
KEY_ORDER = "key_order"  # rows by ascending key, int64; only where file order, prepare's, is another
BATCH_ROWS = 4096
BLOCK_ROWS = 1 << 16


def write_view(folder: Path, pairs: Path) -> None:
    """Write FILES of PAIRS/responses.parquet into `folder`; temporary files take 32 bytes a response."""
    with spill_folder(scratch_folder()) as scratch:
        first = _first_rows(pairs, scratch)
        _number_prompts(first, folder / "prompt_numbers")
        with ExitStack() as stack:
            names = FILES.keys() - {"prompt_numbers"}
            files = {name: stack.enter_context(open(folder / name, "xb")) for name in sorted(names)}
            ascending = _write_rows(pairs, first, files)
    if not ascending:
        keys = np.memmap(folder / "response_keys", KEY, mode="r")
        keys.argsort(kind="stable").astype(np.int64).tofile(folder / KEY_ORDER)


def _first_rows(pairs: Path, scratch: Path) -> npt.NDArray[np.int64]:
    """Of each response the first one that has its prompt, (n,), mapped from `scratch`."""
    spill, n_rows = Spill(scratch, KEY_BITS), 0
    for rows in iter_responses(pairs, ["prompt_key"], rows=BLOCK_ROWS):
        numbers = np.arange(n_rows, n_rows + len(rows))
        spill.add(pa.table({KEY_COLUMN: rows["prompt_key"].to_arrow().cast(pa.binary(KEY.itemsize)), "row": numbers}))
        n_rows += len(rows)
    first = _new_array(scratch / "first", np.int64, n_rows)
    for number in range(1 << KEY_BITS):
        tables = spill.take(number)
        if tables:
            bucket = pa.concat_tables(tables).combine_chunks()
            rows_there = bucket["row"].to_numpy()
            coded = bucket[KEY_COLUMN].chunk(0).dictionary_encode()
            inverse = coded.indices.to_numpy()
            firsts = np.empty(len(coded.dictionary), np.int64)
            firsts[inverse[::-1]] = rows_there[::-1]  # of several the last is kept, so here the first
            first[rows_there] = firsts[inverse]
    return first


def _number_prompts(first: npt.NDArray[np.int64], path: Path) -> None:
    """Write the number of each response's prompt, in order of first appearance."""
    numbers, n_prompts = _new_array(path, np.int32, len(first)), 0
    for start in range(0, len(first), BLOCK_ROWS):
        block = first[start : start + BLOCK_ROWS]
        new = block == np.arange(start, start + len(block))
        here = numbers[start : start + len(block)]
        here[:] = n_prompts - 1 + np.cumsum(new)
        here[~new] = numbers[block[~new]]
        n_prompts += int(new.sum())


def _write_rows(pairs: Path, first: npt.NDArray[np.int64], files: Mapping[str, BinaryIO]) -> bool:
    """Write the rest, batch by batch; returns whether the keys ascend."""
    columns = ["response_key", "prompt_key", "split", "prompt_ids", "response_ids"]
    ascending, before, n_rows = True, np.zeros(1, KEY), 0
    responses, prompts = (IdsWriter(files[f"{name}_starts"], files[f"{name}_ids"]) for name in ("response", "prompt"))
    for rows in iter_responses(pairs, columns, rows=BATCH_ROWS):
        keys = key_array(rows["response_key"])
        ascending = ascending and bool((np.concatenate([before, keys[:-1]]) <= keys).all())
        before = keys[-1:]
        new = first[n_rows : n_rows + len(rows)] == np.arange(n_rows, n_rows + len(rows))
        n_rows += len(rows)
        files["response_keys"].write(keys.tobytes())
        files["train"].write((rows["split"] == "train").to_numpy().tobytes())
        responses.add(rows["response_ids"])
        there = rows.filter(pl.Series(new))
        files["prompt_keys"].write(key_array(there["prompt_key"]).tobytes())
        prompts.add(there["prompt_ids"])
    return ascending


class IdsWriter:
    """Lists of token ids, one after the other, and where each begins."""

    def __init__(self, starts: BinaryIO, ids: BinaryIO) -> None:
        self._starts, self._ids, self._written = starts, ids, 0
        starts.write(np.zeros(1, np.int64).tobytes())

    def add(self, lists: pl.Series) -> None:
        values: Any = lists.to_arrow()
        offsets = values.offsets.to_numpy().astype(np.int64)
        ids = values.values.to_numpy()[offsets[0] : offsets[-1]] if len(lists) else np.empty(0, np.int32)
        self._starts.write((offsets[1:] - offsets[0] + self._written).tobytes())
        self._ids.write(np.ascontiguousarray(ids, np.int32).tobytes())
        self._written += len(ids)


def _new_array(path: Path, dtype: Any, size: int) -> npt.NDArray[Any]:
    if not size:  # nothing can be mapped
        path.touch()
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="w+", shape=(size,))
