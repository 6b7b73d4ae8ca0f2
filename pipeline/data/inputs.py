"""Everything that `prepare` reads, in canonical form: preferences of both sides and supervised examples."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from pipeline.data.demo import demo_rows, demo_sft_rows
from pipeline.data.dialogues import readable
from pipeline.data.files import BadRow, Row, find_files, read_file
from pipeline.data.preferences import CONTEXT, Preference, SupervisedExample, parse_preferences, parse_supervised
from pipeline.data.sources import read_dataset
from pipeline.data.splitting import is_selected, side_of
from pipeline.params import ColumnNames, PrepareParams


class Inputs(NamedTuple):
    preferences: list[Preference]  # in input order; to be split by prompt where `test` is None
    test: list[Preference] | None
    supervised: list[SupervisedExample]
    bad: list[BadRow]
    unused: list[str]  # columns that no row's meaning was taken from, sorted


def read_inputs(params: PrepareParams, *, chat: bool) -> Inputs:
    """Read and parse all rows, collecting bad ones. Raises RequestError for missing files, unknown splits, ..."""
    bad: list[BadRow] = []
    unused: set[str] = set()
    columns = ColumnNames() if params.source == "demo" else params.columns
    sources, test_sources = _sources(params, unused, chat=chat)
    parsed = {name: list(_preferences(rows, columns, bad, chat=chat)) for name, rows in sources}
    preferences = list(chain.from_iterable(parsed.values()))
    test = None
    if test_sources:
        test = list(chain.from_iterable(_preferences(rows, columns, bad, chat=chat) for _, rows in test_sources))
    if params.sft.source == "pairs":
        names = params.sft.pairs_files or list(parsed)[:1]
        supervised = _chosen_responses(chain.from_iterable(parsed[name] for name in names), test, params)
    else:
        supervised = list(_supervised(_sft_rows(params, unused), columns, bad, chat=chat))
    return Inputs(preferences, test, supervised, bad, sorted(unused))


Source = tuple[str, Iterator[Row | BadRow]]


def _noting(rows: Iterator[Row | BadRow], used: set[str], unused: set[str]) -> Iterator[Row | BadRow]:
    """The same rows; `unused` gets the names of their columns that are not among `used`."""
    for row in rows:
        if isinstance(row, Row):
            unused |= row.values.keys() - used
        yield row


def _sources(params: PrepareParams, unused: set[str], *, chat: bool) -> tuple[list[Source], list[Source]]:
    """(name, rows) of every source of pairs, and of every source of test pairs (none: split by prompt)."""
    pairs, test = _named_rows(params)
    used = set(params.columns.model_dump(exclude={"completion"}).values()) | set(CONTEXT if chat else ())
    if params.source == "demo":
        return pairs, test
    noted = [[(name, _noting(rows, used, unused)) for name, rows in sources] for sources in (pairs, test)]
    return noted[0], noted[1]


def _named_rows(params: PrepareParams) -> tuple[list[Source], list[Source]]:
    folder = Path(params.input)
    if params.source == "demo":
        return [("demo", demo_rows(params.demo))], []
    if params.source == "hub":
        hub = params.hub
        assert hub is not None  # PrepareParams sees to it
        test = [(hub.test_split, read_dataset(hub, hub.test_split, folder))] if hub.test_split else []
        return [(hub.split, read_dataset(hub, hub.split, folder))], test
    files = params.files
    assert files is not None
    read = [[(name, _read(folder, name)) for name in dict.fromkeys(names)] for names in (files.pairs, files.test_pairs)]
    return read[0], read[1]


def _read(folder: Path, name: str) -> Iterator[Row | BadRow]:
    return chain.from_iterable(read_file(folder, file) for file in find_files(folder, name))


def _sft_rows(params: PrepareParams, unused: set[str]) -> Iterable[Row | BadRow]:
    if params.sft.source == "demo":
        return demo_sft_rows(params.demo)
    if params.sft.source == "none":
        return ()
    used = {params.columns.prompt, params.columns.completion, "messages"}
    return _noting(chain.from_iterable(_read(Path(params.input), name) for name in params.sft.files), used, unused)


def _preferences(
    rows: Iterable[Row | BadRow], columns: ColumnNames, bad: list[BadRow], *, chat: bool
) -> Iterator[Preference]:
    for row in rows:
        for parsed in [row] if isinstance(row, BadRow) else parse_preferences(row, columns, chat=chat):
            if isinstance(parsed, BadRow):
                bad.append(parsed)
            else:
                yield parsed


def _supervised(
    rows: Iterable[Row | BadRow], columns: ColumnNames, bad: list[BadRow], *, chat: bool
) -> Iterator[SupervisedExample]:
    for row in rows:
        parsed = row if isinstance(row, BadRow) else parse_supervised(row, columns, chat=chat)
        if isinstance(parsed, BadRow):
            bad.append(parsed)
        else:
            yield parsed


def _chosen_responses(
    preferences: Iterable[Preference], test: list[Preference] | None, params: PrepareParams
) -> list[SupervisedExample]:
    """The distinct chosen responses of a share of the training prompts, in input order."""
    test_texts = {readable(preference.prompt) for preference in test or ()}
    found: dict[tuple[object, object], SupervisedExample] = {}
    for preference in preferences:
        text = readable(preference.prompt)
        if test is None:
            trains = side_of(text, seed=params.split_seed, test_share=params.test_share) == "train"
        else:
            trains = text not in test_texts
        if trains and is_selected(text, share=params.sft.pairs_share):
            example = SupervisedExample(preference.where, preference.prompt, preference.chosen)
            found.setdefault((preference.prompt, preference.chosen), example)
    return list(found.values())
