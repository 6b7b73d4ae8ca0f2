"""Responses that can't be scored, named by key and by the line of the input they came from, so that they are found."""

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import polars as pl

from pipeline.data.tables import scan_sources
from pipeline.engine.supervision import Quarantined
from pipeline.errors import RequestError, RunFailed
from pipeline.model.limits import UnscorableRow
from pipeline.workspace import log_file

_NAMED_AT_ONCE = 20
_NAMED_IN_THE_END = 3
_LINES = 3  # of the input, for one response


Folders = Mapping[str, Path]  # prepared pairs by what stands before their lines: "" or "suite NAME "


def announce(bad: Sequence[UnscorableRow], folders: Folders) -> None:
    """Name the rows on stderr before the others are scored, so that nobody waits hours to hear of them."""
    named = _named([(row.key, row.problem) for row in bad], folders)
    print("\n".join(_some(named, _NAMED_AT_ONCE)), file=sys.stderr, flush=True)


def refuse(
    bad: Sequence[UnscorableRow],
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
    if not bad and not quarantined:
        return
    found = [(row.key, row.problem) for row in bad]
    found += [(row.key, f"ended three engines, the last one when asked alone ({row.log})") for row in quarantined]
    remedies = list(dict.fromkeys(row.remedy for row in bad))
    if quarantined:
        remedies.append("Remove the pairs of the rows that end engines, or see in those logs what they do.")
    rest = total - len(found)
    message = "\n".join(
        [
            f"{len(found):,} of {total:,} responses can't be scored by {model}:",
            *(f"  {line}" for line in _some(_named(found, folders), _NAMED_IN_THE_END)),
            *([f"All are listed in {_write_list(found, folders)}."] if len(found) > _NAMED_IN_THE_END else []),
            *remedies,
            f"The other {rest:,} are scored and journalled and won't be scored again; "
            f"{' and '.join(map(str, out))} {'is as it was' if len(out) == 1 else 'are as they were'}.",
        ]
    )
    raise RunFailed(message) if quarantined else RequestError(message)


def source_lines(folders: Folders, keys: Collection[bytes]) -> dict[bytes, list[str]]:
    """Where in the input each of the responses `keys` came from ("file:line"), in file order; absent if nowhere."""
    found = dict[bytes, list[str]]()
    for label, pairs in folders.items():
        theirs = scan_sources(pairs).filter(pl.col("response_key").is_in(frozenset(keys)))
        for key, source in theirs.select("response_key", "source").collect().iter_rows():
            found.setdefault(key, []).append(f"{label}{source}")
    return found


def _named(found: Sequence[tuple[bytes, str]], folders: Folders) -> list[str]:
    sources = source_lines(folders, [key for key, _ in found])
    return [f"Response {key.hex()} ({_lines(sources.get(key, []))}) {problem}." for key, problem in found]


def _lines(sources: list[str]) -> str:
    if not sources:
        return "of no pair"
    more = len(sources) - _LINES
    return ", ".join(sources[:_LINES]) + (f" and {more} more" if more > 0 else "")


def _some(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"... and {len(lines) - most:,} more."]


def _write_list(found: Sequence[tuple[bytes, str]], folders: Folders) -> Path:
    file = log_file("score").with_name("unscorable.tsv")
    sources = source_lines(folders, [key for key, _ in found])
    lines = [f"{key.hex()}\t{' '.join(sources.get(key, []))}\t{problem}\n" for key, problem in found]
    file.write_text("response_key\tsource\tproblem\n" + "".join(lines))
    return file
