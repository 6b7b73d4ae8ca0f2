"""The order of scoring and of sketching for any number of rows: an external sort, in memory that does not follow them.

Rows are numbered as in their table. A counting sort by length, with the first bits of a key, puts their numbers into a
mapped file; then slabs of neighbouring numbers are sorted exactly, one after the other, as they are asked for. Arrays
of a row's key, prompt and tokens are mapped files, too, whose pages are not the process's own memory.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from cache.key_set import KeyArray

CHUNK_ROWS = 1 << 17  # looked at together
SLAB_ROWS = 1 << 15  # sorted together, at least
CODE_BITS = 18  # log2 of the buckets of the counting sort, as far as lengths allow

Numbers: TypeAlias = npt.NDArray[np.int64]  # of rows, (n,)
Chosen: TypeAlias = npt.NDArray[np.bool_]  # (rows,)


class RowTable(NamedTuple):
    """What the order depends on. keys: of responses, (rows,) of S16; prompts: number of each row's prompt, (rows,);
    prompt_keys: (prompts,) of S16, distinct; tokens: of each row with its prompt, (rows,)."""

    keys: KeyArray
    prompts: npt.NDArray[np.integer]
    prompt_keys: KeyArray
    tokens: npt.NDArray[np.integer]


class _Order(NamedTuple):
    """primary: what rows are sorted by first, descending, >= 0; tie: the key that says which of equals comes first;
    exact: keys of np.lexsort for rows that are sorted by both already, but for their last bits."""

    primary: Callable[[Numbers], npt.NDArray[np.integer]]
    tie: Callable[[Numbers], KeyArray]
    exact: Callable[[Numbers], list[npt.NDArray[np.integer]]]


def in_scoring_order(
    rows: RowTable, chosen: Chosen, *, among: Chosen | None = None, scratch: Path
) -> Iterator[Numbers]:
    """The numbers of the chosen rows in the order of `pipeline.engine.rows.scoring_order`, one slab after the other.

    among: rows among which the longest of each prompt is looked for, those chosen among them; None for all. scratch:
    folder for temporary files of 8 bytes a row and 4 a prompt.
    """
    longest = new_array(scratch / "longest", np.int32, len(rows.prompt_keys))
    for numbers in chunks(len(rows.keys), among):
        np.maximum.at(longest, rows.prompts[numbers], rows.tokens[numbers].astype(np.int32))

    def exact(numbers: Numbers) -> list[npt.NDArray[np.integer]]:
        prompts = rows.prompts[numbers]
        by_key, by_prompt = _halves(rows.keys[numbers]), _halves(rows.prompt_keys[prompts])
        return [*by_key, -rows.tokens[numbers].astype(np.int64), *by_prompt, -longest[prompts]]

    order = _Order(
        primary=lambda numbers: longest[rows.prompts[numbers]],
        tie=lambda numbers: rows.prompt_keys[rows.prompts[numbers]],
        exact=exact,
    )
    yield from _sorted(order, len(rows.keys), chosen, scratch)


def longest_first(rows: RowTable, chosen: Chosen, *, scratch: Path) -> Iterator[Numbers]:
    """The numbers of the chosen rows, longest first, ties by key; otherwise as `in_scoring_order`."""
    order = _Order(
        primary=lambda numbers: rows.tokens[numbers],
        tie=lambda numbers: rows.keys[numbers],
        exact=lambda numbers: [*_halves(rows.keys[numbers]), -rows.tokens[numbers].astype(np.int64)],
    )
    yield from _sorted(order, len(rows.keys), chosen, scratch)


def cut_by_prompt(ordered: Iterator[Numbers], rows: RowTable, rows_per_call: int) -> Iterator[Numbers]:
    """`ordered` rows cut as `pipeline.engine.rows.calls` cuts them."""
    waiting = np.empty(0, np.int64)
    for slab in ordered:
        waiting = np.concatenate([waiting, slab])
        start = 0
        while len(waiting) - start > rows_per_call:
            prompts = rows.prompts[waiting[start : start + rows_per_call + 1]]
            others = np.flatnonzero(prompts != prompts[-1])
            stop = start + (int(others[-1]) + 1 if len(others) else rows_per_call)
            yield waiting[start:stop]
            start = stop
        waiting = waiting[start:]
    if len(waiting):
        yield waiting


def cut_by_tokens(ordered: Iterator[Numbers], rows: RowTable, batch_tokens: int) -> Iterator[Numbers]:
    """Rows that come longest first, in batches of at most `batch_tokens` tokens with padding; at least one row each."""
    waiting = np.empty(0, np.int64)
    for slab in ordered:
        waiting = np.concatenate([waiting, slab])
        start, count = 0, _fitting(waiting, rows, batch_tokens)
        while len(waiting) - start > count:
            yield waiting[start : start + count]
            start += count
            count = _fitting(waiting[start:], rows, batch_tokens)
        waiting = waiting[start:]
    if len(waiting):
        yield waiting


def _fitting(waiting: Numbers, rows: RowTable, batch_tokens: int) -> int:
    return max(1, batch_tokens // int(rows.tokens[waiting[0]]))


def _sorted(order: _Order, n_rows: int, chosen: Chosen, scratch: Path) -> Iterator[Numbers]:
    top = max((int(order.primary(numbers).max()) for numbers in chunks(n_rows, chosen)), default=0)
    bits = max(0, CODE_BITS - (top + 1).bit_length())

    def codes(numbers: Numbers) -> npt.NDArray[np.int64]:
        return (top - order.primary(numbers).astype(np.int64)) << bits | _leading(order.tie(numbers), bits)

    counts = np.zeros((top + 1) << bits, np.int64)
    for numbers in chunks(n_rows, chosen):
        counts += np.bincount(codes(numbers), minlength=len(counts))
    ends = np.cumsum(counts)
    placed = new_array(scratch / "order", np.int64, int(ends[-1]))
    free = ends - counts
    for numbers in chunks(n_rows, chosen):
        found = codes(numbers)
        by_code = np.argsort(found, kind="stable")
        values, first, repeats = np.unique(found[by_code], return_index=True, return_counts=True)
        places = np.arange(len(found)) + np.repeat(free[values] - first, repeats)
        placed[places] = numbers[by_code]
        free[values] += repeats
    for start, stop in pairwise(_slabs(ends)):
        numbers = np.array(placed[start:stop])
        yield numbers[np.lexsort(order.exact(numbers))]


def _slabs(ends: npt.NDArray[np.int64]) -> Iterator[int]:
    """Where slabs of whole buckets end, each of SLAB_ROWS or more but the last; ends: of the buckets."""
    yield (reached := 0)
    while reached < ends[-1]:
        bucket = min(int(ends.searchsorted(reached + SLAB_ROWS)), len(ends) - 1)
        yield (reached := int(ends[bucket]))


def chunks(n_rows: int, chosen: Chosen | None = None) -> Iterator[Numbers]:
    """The numbers of all or of the chosen rows, ascending, in arrays of at most CHUNK_ROWS and at least one."""
    for start in range(0, n_rows, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, n_rows)
        numbers = np.arange(start, stop) if chosen is None else start + np.flatnonzero(chosen[start:stop])
        if len(numbers):
            yield numbers


def new_array(path: Path, kind: type[np.integer], length: int) -> npt.NDArray[np.integer]:
    """A new file of zeros; its pages are the system's to take back."""
    return np.memmap(path, kind, "w+", shape=(length,)) if length else np.zeros(0, kind)


def _halves(keys: KeyArray) -> list[npt.NDArray[np.uint64]]:
    """The low and the high half of each key, which numpy sorts several times faster than strings."""
    halves = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2).astype(np.uint64)
    return [halves[:, 1], halves[:, 0]]


def _leading(keys: KeyArray, bits: int) -> npt.NDArray[np.int64]:
    leading = np.ascontiguousarray(keys).view(">u4")[::4].astype(np.int64)
    return leading >> (32 - bits)
