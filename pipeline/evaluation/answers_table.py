"""Sampled answers as people read them: texts, log-probs under both models, and rewards where the truth is known."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.model.tokenizer import open_tokenizer


def answers_table(
    rows: pl.DataFrame,
    *,
    author: str,
    n: int,
    policy: Mapping[bytes, float],
    reference: Mapping[bytes, float],
    rewards: list[float] | None,
    tokenizer: Path,
    trust_remote_code: bool = False,
) -> pl.DataFrame:
    """One row an answer of samples.parquet (docs/evaluation.md). rows: `n` consecutive ones a prompt.

    author: "policy" or "reference", who wrote them. policy, reference: summed log-prob by response_key, nats.
    """
    keys = rows["response_key"]
    return rows.select("prompt_key", "prompt_text").with_columns(
        pl.lit(author).alias("author"),
        pl.Series("sample", np.tile(np.arange(n, dtype=np.int32), len(rows) // n)),
        pl.Series("text", texts(rows, tokenizer, trust_remote_code)),
        rows["response_ids"].list.len().cast(pl.Int32).alias("n_tokens"),
        pl.Series("policy_logp", [policy[key] for key in keys], dtype=pl.Float64),
        pl.Series("reference_logp", [reference[key] for key in keys], dtype=pl.Float64),
        pl.Series("true_reward", rewards, dtype=pl.Float64)
        if rewards
        else pl.lit(None, pl.Float64).alias("true_reward"),
    )


def true_rewards(
    answers: pl.DataFrame, responses: pl.DataFrame, tokenizer: Path, trust_remote_code: bool
) -> list[float] | None:
    """The true reward of each answer; None unless the data is the generated one, whose reward is known of any text."""
    if not _is_demo(responses, answers):
        return None
    from pipeline.data.demo import true_reward

    found = texts(answers, tokenizer, trust_remote_code)
    return [true_reward(prompt, text) for prompt, text in zip(answers["prompt_text"], found, strict=True)]


def _is_demo(responses: pl.DataFrame, answers: pl.DataFrame) -> bool:
    """Annotated rewards, and prompts of the generated dataset."""
    from pipeline.data.demo import solve

    if responses["reward"].null_count():
        return False
    try:
        for text in answers["prompt_text"].unique():
            solve(text)
    except ValueError:
        return False
    return True


def texts(rows: pl.DataFrame, tokenizer: Path, trust_remote_code: bool = False) -> list[str]:
    """The answers without special tokens, by the tokenizer in a folder."""
    opened = _tokenizer(tokenizer, trust_remote_code)
    found: list[str] = opened.batch_decode(rows["response_ids"].to_list(), skip_special_tokens=True)
    return found


@lru_cache(maxsize=1)
def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    return open_tokenizer(folder, trust_remote_code=trust_remote_code)
