"""The responses that a stage is about: where their tokens lie, which are missing, and these in calls, one at a time.

What follows the rows lies in mapped files, the token views and temporary ones; of its own the process has a byte a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from cache import Journal, KeySet, StoredRows
from cache.key_set import KEY, KeyArray, key_array, key_column
from cache.schema import KEY_COLUMN
from cache.spill import stored_key_set
from pipeline.engine.rows import SKETCHED
from pipeline.model.limits import BadRows, ModelLimits
from pipeline.reference.order import (
    CHUNK_ROWS,
    Chosen,
    Numbers,
    RowTable,
    chunks,
    cut_by_prompt,
    cut_by_tokens,
    in_scoring_order,
    longest_first,
    new_array,
)
from pipeline.tokens.view import TokenView

FRAME_ROWS = 2000  # of those with tokens, where all rows are looked at


class Responses:
    """All responses of some prepared folders, numbered in the order of folders and files.

    table: their keys, prompts and lengths. train: whether the split is "train", (n,). scratch: a folder for temporary
    files, this object's alone, as long as it is used.
    """

    def __init__(self, views: Sequence[TokenView], scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self.views, self.scratch = views, scratch
        self._starts = np.cumsum([0, *map(len, views)])
        tokens = new_array(scratch / "tokens", np.int32, int(self._starts[-1]))
        for view, start in zip(views, self._starts, strict=False):
            for rows in _spans(len(view)):
                tokens[start + rows.start : start + rows.stop] = _tokens(view, rows)
        if len(views) == 1:
            (view,) = views
            self.table, self.train = RowTable(view.keys, view.prompt_numbers, view.prompt_keys, tokens), view.train
        else:
            self.table = _joined(views, tokens)
            self.train = np.concatenate([np.zeros(0, np.bool_), *(view.train for view in views)])

    def __len__(self) -> int:
        return len(self.table.keys)

    @property
    def all(self) -> Chosen:
        return np.ones(len(self), np.bool_)

    @property
    def response_tokens(self) -> int:
        """Of all responses, without their prompts."""
        return sum(int(view.response_starts[-1]) for view in self.views)

    def key_set(self, chosen: Chosen | None = None) -> KeySet:
        """The keys of all or of the chosen responses, mapped from a temporary file."""
        return stored_key_set(self.key_batches(chosen), self.scratch / ("keys" if chosen is None else "chosen-keys"))

    def key_batches(self, chosen: Chosen | None = None) -> Iterator[pa.RecordBatch]:
        """The keys of all or of the chosen responses, in file order, some at a time."""
        for rows in _spans(len(self)):
            keys = self.table.keys[rows] if chosen is None else self.table.keys[rows][chosen[rows]]
            yield pa.record_batch([key_column(keys)], [KEY_COLUMN])

    def among(self, keys: KeySet) -> Chosen:
        """Which responses are among `keys`, (n,)."""
        return ~self.without(self.all, keys)

    def chosen(self, numbers: Numbers) -> Chosen:
        """Which responses have these numbers, (n,)."""
        chosen = np.zeros(len(self), np.bool_)
        chosen[numbers] = True
        return chosen

    def without(self, chosen: Chosen, known: KeySet) -> Chosen:
        """The chosen ones that are not `known`."""
        left = chosen.copy()
        for rows in _spans(len(self)) if len(known) else ():
            numbers = np.flatnonzero(left[rows])
            left[rows.start + numbers] = ~known.contains(self.table.keys[rows][numbers])
        return left

    def frame(self, numbers: Numbers) -> pl.DataFrame:
        """ROW_COLUMNS of these responses, in the order asked."""
        if len(self.views) == 1:
            return _frame(self.views[0], numbers)
        owners = self._starts.searchsorted(numbers, side="right") - 1
        parts, places = list[pl.DataFrame](), list[npt.NDArray[np.int64]]()
        for owner in np.unique(owners):
            places.append(np.flatnonzero(owners == owner))
            parts.append(_frame(self.views[owner], numbers[places[-1]] - self._starts[owner]))
        return pl.concat(parts)[np.argsort(np.concatenate(places))] if parts else _frame(self.views[0], numbers)

    def fit(self, limits: ModelLimits) -> bool:
        """Whether it shows at a glance that a model can take all of them: else some may be bad, and are looked for."""
        longest = max((int(self.table.tokens[rows].max()) for rows in _spans(len(self))), default=0)
        flats = [flat for view in self.views for flat in (view.flat_responses, view.flat_prompts)]
        ids = (flat[span] for flat in flats for span in _spans(len(flat), 1 << 20))
        within = all(int(part.min()) >= 0 and int(part.max()) < limits.vocabulary for part in ids)
        starts = [each for view in self.views for each in (view.response_starts, view.prompt_starts)]
        none_empty = all(bool((s[1:][rows] > s[:-1][rows]).all()) for s in starts for rows in _spans(len(s) - 1))
        return within and none_empty and (limits.positions is None or longest <= limits.positions)


@dataclass(frozen=True)
class Wanted:
    """Responses to ask for. chosen: which of `of`, (n,); among: see `in_scoring_order`; sketched: the column SKETCHED
    of all, (n,)."""

    of: Responses
    chosen: Chosen
    among: Chosen | None = None
    sketched: Chosen | None = None

    def __len__(self) -> int:
        return int(np.count_nonzero(self.chosen))

    @property
    def tokens(self) -> int:
        """Of all, with their prompts."""
        spans, tokens = _spans(len(self.of)), self.of.table.tokens
        return sum(int(tokens[rows][self.chosen[rows]].sum(dtype=np.int64)) for rows in spans)

    @property
    def longest(self) -> int:
        """Tokens of the longest one with its prompt; 0 for none."""
        spans, tokens = _spans(len(self.of)), self.of.table.tokens
        return max((int(tokens[rows][self.chosen[rows]].max(initial=0)) for rows in spans), default=0)

    def frames(self, most: int) -> Iterator[pl.DataFrame]:
        """ROW_COLUMNS in file order, `most` rows at a time."""
        for numbers in chunks(len(self.of), self.chosen):
            for rows in _spans(len(numbers), most):
                yield self.of.frame(numbers[rows])

    def calls(self, rows_per_call: int) -> Iterator[pl.DataFrame]:
        """In the order of scoring: ROW_COLUMNS and SKETCHED, cut as `pipeline.engine.rows.calls`; once."""
        table = self.of.table
        ordered = in_scoring_order(table, self.chosen, among=self.among, scratch=self.of.scratch)
        for numbers in cut_by_prompt(ordered, table, rows_per_call):
            sketched = np.zeros(len(numbers), np.bool_) if self.sketched is None else self.sketched[numbers]
            yield self.of.frame(numbers).with_columns(pl.Series(SKETCHED, sketched))

    def batches(self, batch_tokens: int) -> Iterator[pl.DataFrame]:
        """Longest first: ROW_COLUMNS of batches of at most `batch_tokens` tokens, padding included; once."""
        table = self.of.table
        ordered = longest_first(table, self.chosen, scratch=self.of.scratch)
        return map(self.of.frame, cut_by_tokens(ordered, table, batch_tokens))


def set_bad_aside(parts: Sequence[Wanted], limits: ModelLimits, model: Path) -> tuple[list[Wanted], BadRows]:
    """What the model can take of each part, and all others."""
    doubtful = (part for part in parts if not part.of.fit(limits))
    bad = BadRows((frame for part in doubtful for frame in part.frames(FRAME_ROWS)), limits, model)
    keys = KeySet(bad.keys)
    return [replace(part, chosen=part.of.without(part.chosen, keys)) for part in parts], bad


def without_rows_of(sources: Sequence[Journal | StoredRows], parts: Sequence[Wanted], scratch: Path) -> list[Wanted]:
    """What none of `sources` has of each part; those after the first that leaves nothing are not read."""
    left = list(parts)
    for number, source in enumerate(sources):
        if any(map(len, left)):
            known = stored_key_set(source.key_tables(), scratch / str(number))
            left = [replace(part, chosen=part.of.without(part.chosen, known)) for part in left]
    return left


def _frame(view: TokenView, numbers: Numbers) -> pl.DataFrame:
    prompts = view.prompt_numbers[numbers]
    return pl.DataFrame(
        {
            KEY_COLUMN: pl.from_arrow(key_column(view.keys[numbers])),
            "prompt_key": pl.from_arrow(key_column(view.prompt_keys[prompts])),
            "prompt_ids": _lists(view.flat_prompts, view.prompt_starts, prompts),
            "response_ids": _lists(view.flat_responses, view.response_starts, numbers),
        }
    )


def _lists(flat: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], numbers: npt.NDArray[np.integer]) -> pl.Series:
    first, stop = starts[numbers], starts[numbers + 1]
    offsets = np.concatenate([[0], np.cumsum(stop - first)])
    parts = [flat[a:b] for a, b in zip(first.tolist(), stop.tolist(), strict=True)]
    values = np.concatenate([np.empty(0, np.int32), *parts])
    found = pl.from_arrow(pa.LargeListArray.from_arrays(offsets, values))
    assert isinstance(found, pl.Series)
    return found


def _tokens(view: TokenView, rows: slice) -> npt.NDArray[np.int64]:
    prompts = view.prompt_numbers[rows]
    starts = view.response_starts[rows.start : rows.stop + 1]
    tokens: npt.NDArray[np.int64] = np.diff(starts) + view.prompt_starts[prompts + 1] - view.prompt_starts[prompts]
    return tokens


def _joined(views: Sequence[TokenView], tokens: npt.NDArray[np.integer]) -> RowTable:
    """Of several folders, which may have prompts in common; some 40 bytes a row of memory."""
    distinct = KeySet(np.concatenate([np.empty(0, KEY), *(view.prompt_keys for view in views)]))
    numbers = [distinct.positions(view.prompt_keys)[view.prompt_numbers] for view in views]
    keys = np.concatenate([np.empty(0, KEY), *(view.keys for view in views)])
    return RowTable(keys, np.concatenate([np.empty(0, np.int64), *numbers]), distinct.array, tokens)


def first_of_each(keys: KeyArray) -> Chosen:
    """Which rows are the first of their key, (n,)."""
    _, first = np.unique(key_array(keys), return_index=True)
    chosen = np.zeros(len(keys), np.bool_)
    chosen[first] = True
    return chosen


def _spans(n_rows: int, size: int = CHUNK_ROWS) -> Iterable[slice]:
    return (slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size))
