"""Responses that can't be scored, named by key and by the line of the input they came from, so that they are found."""

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from pipeline.data.tables import find_sources
from pipeline.engine.supervision import Quarantined
from pipeline.errors import RequestError, RunFailed
from pipeline.model.limits import BadRows
from pipeline.workspace import log_file

_NAMED_AT_ONCE = 20
_NAMED_IN_THE_END = 3
_LINES = 3  # of the input, for one response
_LISTED_AT_ONCE = 50_000  # rows whose lines are looked up together


Folders = Mapping[str, Path]  # prepared pairs by what stands before their lines: "" or "suite NAME "


def announce(bad: BadRows, folders: Folders) -> None:
    """Name the rows on stderr before the others are scored, so that nobody waits hours to hear of them."""
    print("\n".join(_some(_problems(bad, ()), len(bad), _NAMED_AT_ONCE, folders)), file=sys.stderr, flush=True)


def refuse(
    bad: BadRows,
    quarantined: Sequence[Quarantined],
    *,
    folders: Folders,
    out: Sequence[Path],
    total: int,
    model: Path,
) -> None:
    """Raise where rows are left that can't be scored: RunFailed for quarantined ones, else RequestError for bad ones.

    total: responses that the run was about; all others were scored and journalled.
    """
    number = len(bad) + len(quarantined)
    if not number:
        return
    remedies = bad.remedies
    if quarantined:
        remedies.append("Remove the pairs of the rows that end engines, or see in those logs what they do.")
    message = "\n".join(
        [
            f"{number:,} of {total:,} responses can't be scored by {model}:",
            *(f"  {line}" for line in _some(_problems(bad, quarantined), number, _NAMED_IN_THE_END, folders)),
            *([f"All are listed in {_write_list(bad, quarantined, folders)}."] if number > _NAMED_IN_THE_END else []),
            *remedies,
            f"The other {total - number:,} are scored and journalled and won't be scored again; "
            f"{' and '.join(map(str, out))} {'is as it was' if len(out) == 1 else 'are as they were'}.",
        ]
    )
    raise RunFailed(message) if quarantined else RequestError(message)


def source_lines(folders: Folders, keys: Collection[bytes]) -> dict[bytes, list[str]]:
    """Where in the input each of the responses `keys` came from ("file:line"), in file order; absent if nowhere."""
    found = dict[bytes, list[str]]()
    for label, pairs in folders.items():
        for key, sources in find_sources(pairs, keys).items():
            found.setdefault(key, []).extend(label + source for source in sources)
    return found


def _problems(bad: BadRows, quarantined: Sequence[Quarantined]) -> Iterator[tuple[bytes, str]]:
    """Key of each row and what continues "Response KEY ...", one after the other: there may be millions."""
    yield from ((row.key, row.problem) for row in bad)
    for row in quarantined:
        yield row.key, f"ended three engines, the last one when asked alone ({row.log})"


def _some(problems: Iterator[tuple[bytes, str]], number: int, most: int, folders: Folders) -> list[str]:
    found = list(islice(problems, most))
    sources = source_lines(folders, [key for key, _ in found])
    lines = [f"Response {key.hex()} ({_lines(sources.get(key, []))}) {problem}." for key, problem in found]
    return lines if number <= most else [*lines, f"... and {number - most:,} more."]


def _lines(sources: list[str]) -> str:
    if not sources:
        return "of no pair"
    more = len(sources) - _LINES
    return ", ".join(sources[:_LINES]) + (f" and {more} more" if more > 0 else "")


def _write_list(bad: BadRows, quarantined: Sequence[Quarantined], folders: Folders) -> Path:
    path = log_file("score").with_name("unscorable.tsv")
    with path.open("w") as file:
        file.write("response_key\tsource\tproblem\n")
        problems = _problems(bad, quarantined)
        while found := list(islice(problems, _LISTED_AT_ONCE)):
            sources = source_lines(folders, [key for key, _ in found])
            lines = (f"{key.hex()}\t{' '.join(sources.get(key, []))}\t{problem}\n" for key, problem in found)
            file.writelines(lines)
    return path
