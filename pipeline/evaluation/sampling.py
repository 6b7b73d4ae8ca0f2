"""Held-out prompts, the tokens that end an answer, and the folder that vLLM loads a policy from."""

import json
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.model.tokenizer import open_tokenizer


def choose_prompts(responses: pl.DataFrame, count: int) -> pl.DataFrame:
    """The `count` distinct prompts with the smallest keys: prompt_key, prompt_ids, prompt_text.

    Keys are digests, so this is a random sample that is the same for every policy.
    """
    return (
        responses.select("prompt_key", "prompt_ids", "prompt_text").unique("prompt_key").sort("prompt_key").head(count)
    )


def stop_token_ids(model: Path, responses: pl.DataFrame, *, trust_remote_code: bool = False) -> list[int]:
    """Tokens that end an answer, sorted: the model's and tokenizer's end-of-sequence ids, and the data's end of turn.

    The last is the token that all complete responses end with, if no response has it elsewhere: chat templates may
    close a turn with a token that neither config nor tokenizer calls an end.
    """
    found = {id for name in ("generation_config.json", "config.json") for id in _eos_ids(model / name)}
    found |= _tokenizer_eos(model, trust_remote_code)
    ids = pl.col("response_ids")
    complete = responses.filter(~pl.col("truncated"))
    last = complete.select(ids.list.last().unique()).to_series().to_list()
    if len(last) == 1:
        inner = responses.select(ids.list.head(ids.list.len() - 1).list.contains(last[0]).any()).item()
        found |= set() if inner else {last[0]}
    return sorted(found)


def _eos_ids(file: Path) -> list[int]:
    if not file.exists():
        return []
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    eos = content.get("eos_token_id", content.get("text_config", {}).get("eos_token_id"))
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


def _tokenizer_eos(model: Path, trust_remote_code: bool) -> set[int]:
    if not (model / "tokenizer_config.json").exists():
        return set()
    eos = open_tokenizer(model, trust_remote_code=trust_remote_code).eos_token_id
    return set() if eos is None else {eos}
