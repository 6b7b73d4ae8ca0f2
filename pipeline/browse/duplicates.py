"""What of a pair is in other pairs as well, over all pairs of a file, whichever of them are shown."""

from bisect import bisect_left
from collections.abc import Hashable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pyarrow.parquet as pq

from pipeline.data.tables import read_pairs

SHOWN = 20  # other pairs that are named
SIDES = ("chosen", "rejected")

Groups = Mapping[Hashable, list[int]]  # what is shared -> ids of the pairs, each once, ascending


class Others(NamedTuple):
    """How many other pairs, and the first SHOWN of them."""

    total: int
    pairs: list[int]


class Duplicates:
    """Keys say what is the same prompt or response: the same token ids. Memory follows what is repeated."""

    def __init__(self, folder: Path) -> None:
        """folder: of prepared pairs."""
        keys = read_pairs(folder, columns=["pair_id", "prompt_key", "chosen_key", "rejected_key"])
        sides = [keys.select("pair_id", pl.col(f"{side}_key").alias("shared")) for side in SIDES]
        self._prompts = _groups(keys.select("pair_id", pl.col("prompt_key").alias("shared")))
        self._responses = _groups(pl.concat(sides))
        chosen, rejected = (side.join(other, on="shared", how="semi") for side, other in (sides, reversed(sides)))
        self._opposites = {"chosen": _groups(rejected, least=1), "rejected": _groups(chosen, least=1)}
        texts = _text_hashes(folder)
        elsewhere = texts.group_by("shared").agg(pl.col("prompt_key").n_unique()).filter(pl.col("prompt_key") > 1)
        texts = texts.join(elsewhere.select("shared"), on="shared", how="semi")
        self._texts = _groups(texts.select("pair_id", "shared"))
        self._prompt_of = dict(texts.select("pair_id", "prompt_key").unique().iter_rows())
        self._under = {
            (shared, prompt): count
            for shared, prompt, count in texts.group_by("shared", "prompt_key")
            .agg(pl.col("pair_id").n_unique())
            .iter_rows()
        }

    def of_prompt(self, pair: int, prompt_key: bytes) -> Others:
        """Pairs with the same prompt."""
        return _others(self._prompts.get(prompt_key, []), pair)

    def of_response(self, pair: int, key: bytes) -> Others:
        """Pairs that have this response to this prompt, on either side."""
        return _others(self._responses.get(key, []), pair)

    def opposed(self, pair: int, key: bytes, side: str) -> Others:
        """Pairs that have this response to this prompt on the other side: what was chosen here is rejected there."""
        return _others(self._opposites[side].get(key, []), pair)

    def of_text(self, prompt_key: bytes, text: str) -> Others:
        """Pairs that have a response of this text under another prompt."""
        shared = _hash([text])[0]
        group = self._texts.get(shared, [])
        count = len(group) - self._under.get((shared, prompt_key), 0)
        elsewhere = (other for other in group if self._prompt_of[other] != prompt_key)
        return Others(count, list(islice(elsewhere, SHOWN if count else 0)))


def _text_hashes(folder: Path) -> pl.DataFrame:
    """pair_id, prompt_key, and as `shared` a hash of each side's text."""
    found = list[pl.DataFrame]()
    with pq.ParquetFile(folder / "pairs.parquet", pre_buffer=False) as file:
        for batch in file.iter_batches(2000, columns=["pair_id", "prompt_key", "chosen_text", "rejected_text"]):
            rows = pl.DataFrame(batch)
            found += [
                rows.select("pair_id", "prompt_key").with_columns(_hash(rows[f"{side}_text"]).alias("shared"))
                for side in SIDES
            ]
    return pl.concat(found)


def _hash(texts: Iterable[str]) -> pl.Series:
    """64 bits a text: among a million texts two share one by chance in 3 of 10^8 cases."""
    return pl.Series(texts, dtype=pl.String).hash()


def _groups(rows: pl.DataFrame, least: int = 2) -> Groups:
    """rows: pair_id, shared. The pairs of every value that `least` or more have."""
    groups = (
        rows.unique().group_by("shared").agg(pl.col("pair_id").sort()).filter(pl.col("pair_id").list.len() >= least)
    )
    return dict(groups.iter_rows())


def _others(group: list[int], pair: int) -> Others:
    at = bisect_left(group, pair)
    count = len(group) - (at < len(group) and group[at] == pair)
    return Others(count, [other for other in group[: SHOWN + 1] if other != pair][:SHOWN])
