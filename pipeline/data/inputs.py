"""Everything that `prepare` reads, in canonical form: preferences of both sides and supervised examples."""

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.demo import demo_rows, demo_sft_rows
from pipeline.data.preferences import (
    Feedback,
    Preference,
    SupervisedExample,
    parse_feedback,
    parse_pair,
    parse_supervised,
)
from pipeline.data.splitting import is_selected, side_of
from pipeline.encoding.dialogues import readable
from pipeline.params import ColumnNames, PrepareParams
from pipeline.published.files import BadRow, Row, count_rows, find_files, read_file
from pipeline.published.forms import Forms
from pipeline.published.rows import CONTEXT, FeedbackRow, PairRow
from pipeline.published.sources import Dataset


class Source(NamedTuple):
    name: str
    rows: Callable[[], Iterator[Row | BadRow]]
    about: Callable[[], int]  # how many rows


class Inputs:
    """The rows that params name. They are read anew whenever they are asked for, so that memory does not follow them.

    Making one raises RequestError for missing files, unknown splits, ...
    """

    def __init__(self, params: PrepareParams, *, chat: bool) -> None:
        if params.source == "demo":
            params = params.model_copy(update={"columns": ColumnNames(), "form": "pairs"})
        self._params = params
        self._chat = chat
        self._pairs, self._test = _sources(params)
        self.forms = Forms(params, chat=chat)  # of the last reading of preferences
        self.sft_unused: set[str] = set()  # columns of sft files that nothing was taken from

    def rows(self) -> int:
        """How many rows hold the preferences, about."""
        return sum(source.about() for source in [*self._pairs, *self._test])

    def preferences(
        self, first: int = 0, last: int | None = None
    ) -> Iterator[list[tuple[Preference | Feedback | BadRow, str | None]]]:
        """For each row from `first` to before `last`, in input order, what it holds: pairs or feedback with their side,
        which is None where they are to be split by prompt."""
        self.forms = Forms(self._params, chat=self._chat)
        side = "train" if self._test else None
        sources = [(source, side) for source in self._pairs] + [(source, "test") for source in self._test]
        rows = ((row, split) for source, split in sources for row in source.rows())
        for row, split in islice(rows, first, last):
            yield [(part, split) for part in self._parts(row, self.forms)]

    def ids(self) -> Iterator[tuple[str, str | None]]:
        """Where each readable row stands, and its own column `id` as text; None where it has none, or a nested one."""
        for source in [*self._pairs, *self._test]:
            for row in source.rows():
                if isinstance(row, Row):
                    value = row.values.get("id")
                    yield row.where, None if value is None or isinstance(value, list | dict) else str(value)

    def supervised(self) -> Iterator[SupervisedExample | BadRow]:
        """The sft rows in input order; of pairs, their distinct chosen responses (bad rows are told with the pairs)."""
        source = self._params.sft.source
        if source == "pairs":
            yield from self._chosen_responses()
        elif source == "demo":
            yield from self._examples(demo_sft_rows(self._params.demo))
        elif source == "files":
            folder = Path(self._params.input)
            yield from self._examples(chain.from_iterable(_read(folder, name) for name in self._params.sft.files))

    def _parts(self, row: Row | BadRow, forms: Forms) -> Iterator[Preference | Feedback | BadRow]:
        for part in [row] if isinstance(row, BadRow) else forms.read(row):
            if isinstance(part, PairRow):
                yield from parse_pair(part, row.where, chat=self._chat)
            elif isinstance(part, FeedbackRow):
                yield parse_feedback(part, row.where, chat=self._chat)
            else:
                yield part

    def _examples(self, rows: Iterator[Row | BadRow]) -> Iterator[SupervisedExample | BadRow]:
        columns = self._params.columns
        meanings = ("prompt", "completion", "system", "input", "history", "messages")
        used = {name for meaning in meanings for name in columns.candidates(meaning)} | set(
            CONTEXT if self._chat else ()
        )
        for row in rows:
            if isinstance(row, BadRow):
                yield row
            else:
                self.sft_unused.update(n for n, value in row.values.items() if value is not None and n not in used)
                yield parse_supervised(row, columns, chat=self._chat)

    def _chosen_responses(self) -> Iterator[SupervisedExample]:
        """The distinct chosen responses of a share of the training prompts, in input order."""
        params = self._params
        named = params.sft.pairs_files or [source.name for source in self._pairs][:1]
        test_texts = {_digest(readable(example.prompt)) for example in self._liked(self._test)}
        found: set[bytes] = set()
        for example in self._liked([source for source in self._pairs if source.name in named]):
            text = readable(example.prompt)
            if self._test:
                trains = _digest(text) not in test_texts
            else:
                trains = side_of(text, seed=params.split_seed, test_share=params.test_share) == "train"
            if trains and is_selected(text, share=params.sft.pairs_share):
                key = _digest((example.prompt, example.completion))
                if key not in found:
                    found.add(key)
                    yield example

    def _liked(self, sources: Sequence[Source]) -> Iterator[SupervisedExample]:
        """The chosen and the desirable responses."""
        forms = Forms(self._params)
        parts = (part for source in sources for row in source.rows() for part in self._parts(row, forms))
        for row in parts:
            if isinstance(row, Preference):
                yield SupervisedExample(row.where, row.prompt, row.chosen)
            elif isinstance(row, Feedback) and row.desirable:
                yield SupervisedExample(row.where, row.prompt, row.response)


def _digest(value: Any) -> bytes:
    """Stands for texts and messages that would fill memory."""
    return blake2b(repr(value).encode(), digest_size=16).digest()


def _sources(params: PrepareParams) -> tuple[list[Source], list[Source]]:
    """Every source of pairs, and every source of test pairs (none: split by prompt)."""
    folder = Path(params.input)
    if params.source == "demo":
        return [Source("demo", lambda: demo_rows(params.demo), lambda: 0)], []
    if params.source == "hub":
        hub = params.hub
        assert hub is not None  # PrepareParams sees to it
        names = [[hub.split], [hub.test_split] if hub.test_split else []]
        pairs, test = [[_hub_source(name, Dataset(hub, name, folder)) for name in side] for side in names]
        return pairs, test
    files = params.files
    assert files is not None
    pairs, test = [
        [_file_source(folder, name) for name in dict.fromkeys(side)] for side in (files.pairs, files.test_pairs)
    ]
    return pairs, test


def _hub_source(name: str, dataset: Dataset) -> Source:
    return Source(name, dataset.rows, dataset.count)


def _file_source(folder: Path, name: str) -> Source:
    def count() -> int:
        return sum(count_rows(folder, file) for file in find_files(folder, name))

    return Source(name, lambda: _read(folder, name), count)


def _read(folder: Path, name: str) -> Iterator[Row | BadRow]:
    return chain.from_iterable(read_file(folder, file) for file in find_files(folder, name))
