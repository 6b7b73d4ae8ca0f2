"""Pairs -> their log-probs under a model, in one call: what the stages prepare and score do, without files to name."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl

from cache import prompt_key, response_key
from pipeline.errors import RequestError
from pipeline.params import PrepareParams, ScoreParams
from pipeline.workspace import scratch_folder
from refcache.encoding import Pair, Rows, TextEncoder
from refcache.prepared import Response, write_prepared
from refcache.texts import Cache


def score(
    pairs: Rows,
    model: Path | str,
    *,
    tokenizer: Any = None,
    prepare: PrepareParams | None = None,
    params: ScoreParams | None = None,
    out: Path | str | None = None,
) -> pl.DataFrame:
    """The log-probs of both sides of each pair under `model`, by vLLM; the columns of `Cache.join`.

    pairs: as `Cache.join` takes them. model: a transformers folder. tokenizer: a tokenizer or the folder of one; None:
    the model's own. prepare, params: sections of params.yaml, None for their defaults, and an engine without
    compilation, which pays in long runs alone. out: a folder to publish these rows to as a reference cache of their
    own; None: nowhere.

    What was scored before, by this function or by `refcache score` in the same working folder, is taken from the
    journals in .refcache; without anything new no engine is started. Raises what the `score` stage raises, with
    everything scored so far kept.
    """
    from pipeline.reference.scoring import score_responses

    encoder = TextEncoder(model if tokenizer is None else tokenizer, prepare)
    encoded = encoder.pairs(pairs)
    if not encoded:
        raise RequestError("There is no pair to score: `pairs` is empty, or all of its rows were left out.")
    with TemporaryDirectory(dir=scratch_folder(), prefix="api-") as name:
        folder = Path(name)
        _write(folder / "pairs", encoded)
        published = folder / "logps" if out is None else Path(out)
        score_responses(
            pairs=folder / "pairs",
            model=Path(model),
            out=published,
            metrics=folder / "score.json",
            params=params or ScoreParams(enforce_eager=True),
            trainer_dtype="float32",
        )
        return Cache(published, tokenizer=encoder.tokenizer, prepare=prepare, views=folder / "views").values_of(encoded)


def _write(folder: Path, pairs: list[Pair]) -> None:
    responses = {
        response_key(*side): Response(*side, pair.prompt, text)
        for pair in pairs
        for text, side in zip((pair.chosen_text, pair.rejected_text), pair.sides, strict=True)
    }
    rows = [
        {
            "pair_id": number,
            "split": "train",
            "prompt_key": prompt_key(pair.chosen.prompt_ids),
            "chosen_key": response_key(*pair.chosen),
            "rejected_key": response_key(*pair.rejected),
            "prompt_text": pair.prompt,
            "chosen_text": pair.chosen_text,
            "rejected_text": pair.rejected_text,
            "source": f"row {pair.row}",
        }
        for number, pair in enumerate(pairs)
    ]
    write_prepared(folder, responses, rows)
