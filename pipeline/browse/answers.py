"""What policies answered to held-out prompts, as `evaluate` keeps it: results/answers/CELL/samples.parquet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from cache import KeySet
from cache.key_set import key_array
from pipeline.errors import RequestError

COLUMNS = {
    "prompt_key": pl.Binary,
    "author": pl.String,
    "text": pl.String,
    "n_tokens": pl.Int32,
    "policy_logp": pl.Float64,
    "reference_logp": pl.Float64,
    "true_reward": pl.Float64,
}

Answer = list[Any]  # author, text, tokens, log-prob under the policy and the reference (nats), true reward or None
AnswersOfPrompt = Mapping[bytes, Mapping[str, list[Answer]]]  # prompt_key -> cell -> answers


def read_samples(folder: Path, prompts: KeySet) -> tuple[list[str], AnswersOfPrompt]:
    """The cells that have sampled answers, and their answers to `prompts`. folder: with CELL/samples.parquet.

    Raises RequestError where no cell has any, and for a file that is no table of answers.
    """
    files = sorted(folder.glob("*/samples.parquet"))
    if not files:
        raise RequestError(
            f"{folder} has no CELL/samples.parquet, which `refcache evaluate` writes. Leave --answers out to see the "
            "pairs without policies' answers, or run `dvc repro evaluate` (evaluate.prompts above 0)."
        )
    found = dict[bytes, dict[str, list[Answer]]]()
    for file in files:
        rows = _read(file)
        rows = rows.filter(pl.Series(prompts.contains(key_array(rows["prompt_key"]))))
        for key, *answer in rows.iter_rows():
            found.setdefault(key, {}).setdefault(file.parent.name, []).append(answer)
    return [file.parent.name for file in files], found


def _read(file: Path) -> pl.DataFrame:
    numbers = pl.col(pl.Float64)
    try:
        rows = pl.read_parquet(file, columns=list(COLUMNS), glob=False).select(
            pl.col(name).cast(kind) for name, kind in COLUMNS.items()
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).partition("\n")[0]  # polars adds its query plan
        raise RequestError(f"{file} is no table of sampled answers ({reason}); run `dvc repro -f evaluate`.") from None
    return rows.with_columns(pl.when(numbers.is_finite()).then(numbers), pl.col("text").fill_null(""))
