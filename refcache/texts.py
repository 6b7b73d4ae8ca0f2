"""A reference cache that answers for texts, and joins pairs with what it holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from cache import CacheIncomplete, ReferenceIdentity, response_key
from pipeline.errors import RequestError
from pipeline.params import PrepareParams
from refcache.encoding import Pair, Rows, Side, TextEncoder
from refcache.lookup import Paths, ReferenceLookup

SCHEMA: dict[str, Any] = {
    "row": pl.Int64,
    "prompt": pl.String,
    "chosen": pl.String,
    "rejected": pl.String,
    "chosen_key": pl.Binary,
    "rejected_key": pl.Binary,
    "chosen_tokens": pl.Int64,
    "rejected_tokens": pl.Int64,
    "chosen_logp": pl.Float64,
    "rejected_logp": pl.Float64,
    "margin": pl.Float64,
    "chosen_token_logps": pl.List(pl.Float32),
    "rejected_token_logps": pl.List(pl.Float32),
}


class Cache:
    """A published reference cache, opened for reading. Nothing is computed: what it does not hold is an error."""

    def __init__(
        self,
        path: Paths,
        *,
        tokenizer: Any = None,
        prepare: PrepareParams | None = None,
        views: Path | None = None,
    ) -> None:
        """path: a folder that `refcache score` published, or its address (s3://...), or several of one reference.

        tokenizer: a transformers tokenizer or the folder of one, needed to ask by texts; prepare: the section of
        params.yaml that the cache was prepared with (`pipeline.params.load_params`), None for its defaults: texts are
        rendered, tokenised and cut by it, and a cache holds nothing for texts that were cut otherwise. views: where the
        memory-mapped copy of the rows is kept (None: .refcache/views). Raises what `cache.open_reference` raises, and
        CacheMismatch for folders of different references.
        """
        self._encoder = None if tokenizer is None else TextEncoder(tokenizer, prepare)
        decode = None if self._encoder is None else self._encoder.tokenizer.decode
        self._lookup = ReferenceLookup(path, views=views, decode=decode)

    @property
    def identity(self) -> ReferenceIdentity:
        """Which reference computed these values, and how."""
        return self._lookup.references[0].identity

    def __len__(self) -> int:
        """How many responses it holds; one that is in several folders counts in each."""
        return sum(reference.n_rows for reference in self._lookup.references)

    def scan(self) -> pl.LazyFrame:
        """All rows, lazily; the columns are in docs/cache-format.md."""
        return pl.concat([reference.scan() for reference in self._lookup.references])

    def token_logps(self, prompt: Any, response: Any) -> npt.NDArray[np.float32]:
        """log p(token | all before it) of each response token, nats, (response length,).

        prompt and response: token ids (sequences of int), or texts or messages as rows of `prepare` have them; of a
        text, the last value is that of the end-of-turn token. Raises CacheIncomplete, with the likely reason, for what
        the cache does not hold, RequestError for what is neither, and ValueError for ids that are no int32 >= 0.
        """
        return self._lookup.token_logps(*self._side(prompt, response))

    def logp(self, prompt: Any, response: Any) -> float:
        """log p(response | prompt), nats: the sum of `token_logps`."""
        return _sum(self.token_logps(prompt, response))

    def join(self, pairs: Rows) -> pl.DataFrame:
        """One row for each pair, in order, with the reference's values of its two sides.

        pairs: a frame or rows with prompt, chosen and rejected, or any other form that `prepare` reads. Columns: row
        (number in `pairs`), prompt, chosen and rejected as text, and for both sides *_key, *_tokens, *_logp (nats) and
        *_token_logps; margin is chosen_logp - rejected_logp. Raises RequestError for rows that can't be used and
        CacheIncomplete naming the first side that is missing.
        """
        return self.values_of(self.encode(pairs))

    def encode(self, pairs: Rows) -> list[Pair]:
        """Token ids of the pairs, as `prepare` makes them; raises as `join`."""
        return self._require_encoder().pairs(pairs)

    def values_of(self, pairs: list[Pair]) -> pl.DataFrame:
        """`join` of pairs that `encode` gave."""
        rows = [self._row(pair) for pair in pairs]
        return pl.DataFrame(rows, SCHEMA, orient="row")

    def _row(self, pair: Pair) -> dict[str, Any]:
        found: dict[str, Any] = {"row": pair.row, "prompt": pair.prompt}
        found |= {"chosen": pair.chosen_text, "rejected": pair.rejected_text}
        for name, side in zip(("chosen", "rejected"), pair.sides, strict=True):
            try:
                logps = self._lookup.token_logps(*side)
            except CacheIncomplete as error:
                raise CacheIncomplete(f"Row {pair.row}, its {name} response: {error}") from None
            found[f"{name}_key"] = response_key(*side)
            found |= {f"{name}_tokens": len(logps), f"{name}_logp": _sum(logps), f"{name}_token_logps": logps.tolist()}
        return found | {"margin": found["chosen_logp"] - found["rejected_logp"]}

    def _side(self, prompt: Any, response: Any) -> Side:
        if _is_ids(prompt) and _is_ids(response):
            for name, ids in (("prompt", prompt), ("response", response)):
                if not len(ids):
                    raise RequestError(f"The {name} holds no token; a reference cache has rows of at least one.")
            return Side(np.asarray(prompt), np.asarray(response))
        return self._require_encoder().side(prompt, response)

    def _require_encoder(self) -> TextEncoder:
        if self._encoder is None:
            raise RequestError(
                f"{self._lookup.places} was opened without a tokenizer, so that it answers for token ids alone. Give "
                "the one that prepare wrote: Cache(..., tokenizer='data/prepared/tokenizer')."
            )
        return self._encoder


def _is_ids(value: Any) -> bool:
    if isinstance(value, str | Mapping) or not hasattr(value, "__len__"):
        return False
    return not len(value) or not isinstance(value[0], str | Mapping)


def _sum(logps: npt.NDArray[np.float32]) -> float:
    """As a cache's own sum_logp."""
    return float(logps.sum(dtype=np.float64))
