"""Pairs with the reference's log-probs, chosen, measured and written as a folder to look through."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq

from cache import KeySet, open_reference
from cache.key_set import key_array
from pipeline.browse.answers import AnswersOfPrompt, read_samples
from pipeline.browse.duplicates import SIDES, Duplicates, Others
from pipeline.browse.folder import PAIRS_A_FILE, PageFolder, Row
from pipeline.browse.pieces import Piece, Splitter, open_splitter, utf16_length
from pipeline.browse.policies import PolicyLogps, read_policies
from pipeline.browse.stored import Stored, StoredResponses
from pipeline.data.tables import ROW_GROUP_ROWS, read_pairs
from pipeline.errors import RequestError
from pipeline.progress import progress_bar

SMALL_COLUMNS = ["pair_id", "split", "category", "prompt_key", "chosen_key", "rejected_key"]
TEXT_COLUMNS = ["pair_id", "prompt_text", "chosen_text", "rejected_text", "chosen_reward", "rejected_reward", "source"]
MARKS = ("prompt", "response", "text", "opposed")  # of duplicates, as the page's filter names them


class Choice(NamedTuple):
    """Which pairs are shown: of a split (None: all), the first `limit` (None: all) or `sample` drawn ones."""

    split: str | None
    limit: int | None
    sample: int | None
    seed: int


class Browsed(NamedTuple):
    """page: the file to open. pairs of `total`; responses, and how many of them have no row in the cache."""

    page: Path
    pairs: int
    total: int
    responses: int
    missing: int


def write_browser(
    *,
    pairs: Path,
    reference: Path,
    tokenizer: Path,
    out: Path,
    choice: Choice,
    answers: Path | None = None,
    policies: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> Browsed:
    """Write the page and its data into the folder `out`.

    pairs: prepared ones; tokenizer: which encoded them; answers: folder of CELL/samples.parquet; policies:
    folders of trained ones, whose log-probs `evaluate` has kept. Responses without a
    row in the cache are shown without log-probs, and counted. Raises RequestError for a choice without pairs and for
    inputs that do not belong together, and as cache.open_reference.
    """
    cached = open_reference(reference, expect=None)
    every = read_pairs(pairs, columns=SMALL_COLUMNS)
    shown = choose(every, choice, pairs)
    splitter = open_splitter(tokenizer, trust_remote_code=trust_remote_code)
    keys = KeySet(np.concatenate([key_array(shown[f"{side}_key"]) for side in SIDES]))
    cells, samples = ([], {}) if answers is None else read_samples(answers, KeySet(shown["prompt_key"]))
    stored = StoredResponses(pairs, cached, keys)
    read = read_policies(policies, cached.identity, keys)
    book = _Book(stored, Duplicates(pairs), splitter, samples, read)
    folder = PageFolder(out)
    with progress_bar("browse: pairs", len(shown)) as advance:
        folder.write_pairs(book.rows(_with_texts(pairs, shown), advance))
    counts = {"pairs": len(shown), "total": len(every), "responses": len(keys), "missing": stored.missing}
    categories = sorted(shown["category"].drop_nulls().unique())
    splits = sorted(shown["split"].unique())
    index = {
        "pairs_a_file": PAIRS_A_FILE,
        "files": -(-len(shown) // PAIRS_A_FILE),
        "marks": MARKS,
        "splits": splits,
        "categories": categories,
        "columns": book.columns
        | {
            "id": shown["pair_id"].to_list(),
            "split": _codes(shown["split"], splits),
            "category": _codes(shown["category"], categories),
        },
    }
    facts = {
        "pairs_folder": str(pairs),
        "reference_folder": str(reference),
        "identity": cached.identity.to_dict(),
        "reference_id": cached.manifest.reference_id,
        "choice": choice,
        "cells": cells,
        "policies": {name: len(kept) for name, kept in read.items()},
        "splits": splits,
        "categories": categories,
        **counts,
    }
    return Browsed(folder.write_page(index, facts), *counts.values())


def choose(pairs: pl.DataFrame, choice: Choice, folder: Path) -> pl.DataFrame:
    """The pairs that `choice` means, in file order; RequestError where there are none."""
    found = pairs if choice.split is None else pairs.filter(pl.col("split") == choice.split)
    if found.is_empty():
        splits = ", ".join(f"{count} in {name}" for name, count in pairs["split"].value_counts(sort=True).iter_rows())
        raise RequestError(
            f"{folder}/pairs.parquet has no pairs"
            + (f" in split {choice.split!r} ({splits or 'it is empty'})" if choice.split else "")
            + ", so there is nothing to show. Choose another --split, or another folder with --pairs."
        )
    if choice.sample is not None and choice.sample < len(found):
        drawn = np.random.default_rng(choice.seed).choice(len(found), choice.sample, replace=False)
        return found[np.sort(drawn)]
    return found if choice.limit is None else found.head(choice.limit)


def _with_texts(folder: Path, shown: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """The rows of `shown` with their texts, read a row group at a time."""
    with pq.ParquetFile(folder / "pairs.parquet", pre_buffer=False) as file:
        for batch in file.iter_batches(ROW_GROUP_ROWS, columns=TEXT_COLUMNS):
            yield from shown.join(pl.DataFrame(batch), on="pair_id", maintain_order="left").iter_rows(named=True)


def _codes(values: pl.Series, names: list[str]) -> list[int]:
    """Of each value its number in `names`, -1 for none."""
    number = {name: index for index, name in enumerate(names)}
    return [number.get(value, -1) for value in values]


class _Book:
    """Makes a pair's entries, and keeps of each what the index has, in `columns`."""

    def __init__(
        self,
        stored: StoredResponses,
        duplicates: Duplicates,
        splitter: Splitter,
        samples: AnswersOfPrompt,
        policies: PolicyLogps,
    ) -> None:
        self._stored, self._duplicates, self._splitter = stored, duplicates, splitter
        self._samples, self._policies = samples, policies
        self.columns: dict[str, list[Any]] = {
            name: [] for name in ("margin", "token_margin", "chosen", "rejected", "missing", "marks")
        }

    def rows(self, pairs: Iterator[dict[str, Any]], advance: Any) -> Iterator[Row]:
        for pair in pairs:
            yield self._row(pair)
            advance(1)

    def _row(self, pair: dict[str, Any]) -> Row:
        sides = {side: self._stored.of(pair[f"{side}_key"]) for side in SIDES}
        pieces = {side: self._splitter.pieces(sides[side].ids) for side in SIDES}
        others = self._others(pair)
        self._note(sides, others)
        texts = [
            pair["prompt_text"],
            *("".join(piece.text for piece in pieces[side]) for side in SIDES),
            pair["source"],
        ]
        return texts, {
            **{
                side: _tokens(sides[side], pieces[side]) | {"reward": _finite(pair[f"{side}_reward"])} for side in SIDES
            },
            "others": {name: found for name, found in others.items() if found.total},
            "answers": self._samples.get(pair["prompt_key"], {}),
            "policies": {name: self._read_by(name, pair) for name in self._policies},
        }

    def _read_by(self, policy: str, pair: dict[str, Any]) -> dict[str, Any]:
        """Of each side that the policy was asked about, its log-probs as those of the reference."""
        reads = {side: self._policies[policy].get(pair[f"{side}_key"]) for side in SIDES}
        return {
            side: {"sum": round(read.total, 4), "logps": _thousandths(read.logps)}
            for side, read in reads.items()
            if read
        }

    def _others(self, pair: dict[str, Any]) -> dict[str, Others]:
        found, number, prompt = self._duplicates, pair["pair_id"], pair["prompt_key"]
        others = {"prompt": found.of_prompt(number, prompt)}
        for side in SIDES:
            key = pair[f"{side}_key"]
            others[f"{side} response"] = found.of_response(number, key)
            others[f"{side} opposed"] = found.opposed(number, key, side)
            others[f"{side} text"] = found.of_text(prompt, pair[f"{side}_text"])
        return others

    def _note(self, sides: dict[str, Stored], others: dict[str, Others]) -> None:
        columns, (chosen, rejected) = self.columns, sides.values()
        margin = token_margin = None
        if chosen.sum_logp is not None and rejected.sum_logp is not None:
            margin = round(chosen.sum_logp - rejected.sum_logp, 4)
            token_margin = round(chosen.sum_logp / len(chosen.ids) - rejected.sum_logp / len(rejected.ids), 4)
        columns["margin"].append(margin)
        columns["token_margin"].append(token_margin)
        columns["chosen"].append(len(chosen.ids))
        columns["rejected"].append(len(rejected.ids))
        columns["missing"].append(sum(side.sum_logp is None for side in sides.values()))
        kinds = {name.rpartition(" ")[2] for name, found in others.items() if found.total}
        columns["marks"].append(sum(1 << bit for bit, name in enumerate(MARKS) if name in kinds))


def _tokens(stored: Stored, pieces: list[Piece]) -> dict[str, Any]:
    """lengths: UTF-16 units of each token's text, -1 for one that belongs to the piece before. logps: 1/1000 nat."""
    lengths = [length for piece in pieces for length in (utf16_length(piece.text), *[-1] * (piece.tokens - 1))]
    milli = None if stored.logps is None else _thousandths(stored.logps)
    total = None if stored.sum_logp is None else round(stored.sum_logp, 4)
    return {"lengths": lengths, "logps": milli, "sum": total, "truncated": stored.truncated}


def _thousandths(logps: npt.NDArray[np.float32]) -> list[int]:
    found: list[int] = np.rint(logps.astype(np.float64) * 1000).astype(int).tolist()
    return found


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
