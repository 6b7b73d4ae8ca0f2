"""Tiny prepared data, tokenizer and reference for tests that start real engines."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from cache import logps_table, open_reference, prompt_key, publish_reference, response_key
from pipeline.data.tables import PAIRS_SCHEMA, RESPONSES_SCHEMA, SFT_SCHEMA, read_responses, write_table
from pipeline.reference.identity import reference_identity

VOCABULARY = 64
EOS = 2
POSITIONS = 300
TINY_MODEL = {
    "hidden_size": 32,  # one head: vLLM's CPU attention has no kernel for heads of 16
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": POSITIONS,  # more than two of vLLM's CPU blocks of 128
    "tie_word_embeddings": True,
}


def write_tokenizer(folder: Path) -> Path:
    """One token per word: w3 .. w63, with pad 0, bos 1 and eos 2."""
    words = {"<pad>": 0, "<s>": 1, "</s>": EOS} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def draw_sequence(random: np.random.Generator, low: int, high: int) -> list[int]:
    return random.integers(3, VOCABULARY, random.integers(low, high)).tolist()


def write_sft(path: Path, rows: int, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    table = []
    for _ in range(rows):
        prompt, response = draw_sequence(random, 1, 12), [*draw_sequence(random, 1, 20), EOS]
        table.append(
            {
                "prompt_ids": prompt,
                "response_ids": response,
                "prompt_text": text(prompt),
                "response_text": text(response),
            }
        )
    write_table(pa.Table.from_pylist(table, SFT_SCHEMA), path, SFT_SCHEMA)
    return path


def write_pairs(folder: Path, prompts: int, *, responses: int = 3, test_share: float = 0.25, seed: int = 0) -> Path:
    """`prompts` prompts with `responses` responses each; the first response is preferred to every other one."""
    random = np.random.default_rng(seed)
    pairs, rows = [], {}
    for index in range(prompts):
        prompt = draw_sequence(random, 1, 12)
        answers = [[*draw_sequence(random, 1, 20), EOS] for _ in range(responses)]
        split = "test" if index < test_share * prompts else "train"
        keys = [response_key(prompt, answer) for answer in answers]
        shared = {"split": split, "prompt_key": prompt_key(prompt), "prompt_text": text(prompt)}
        for key, answer in zip(keys, answers, strict=True):
            rows[key] = shared | {
                "response_key": key,
                "prompt_ids": prompt,
                "response_ids": answer,
                "truncated": False,
                "response_text": text(answer),
                "reward": None,
            }
        for other in range(1, responses):
            pairs.append(
                shared
                | {
                    "pair_id": len(pairs),
                    "chosen_key": keys[0],
                    "rejected_key": keys[other],
                    "category": "even" if index % 2 == 0 else "odd",
                    "chosen_text": text(answers[0]),
                    "rejected_text": text(answers[other]),
                    "chosen_reward": None,
                    "rejected_reward": None,
                    "source": f"tiny.jsonl:{index + 1}",
                }
            )
    write_table(pa.Table.from_pylist(pairs, PAIRS_SCHEMA), folder / "pairs.parquet", PAIRS_SCHEMA)
    ordered = [rows[key] for key in sorted(rows)]
    write_table(pa.Table.from_pylist(ordered, RESPONSES_SCHEMA), folder / "responses.parquet", RESPONSES_SCHEMA)
    return folder


def write_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random Qwen2 with its tokenizer that vLLM can run on CPU; changes: of the config.

    Weights are large enough that neighbouring positions differ by nats, so that a shifted read can't pass.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        own = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "initializer_range": 0.3} | changes
        Qwen2ForCausalLM(Qwen2Config(**TINY_MODEL | own)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def plain_logps(model: Path, prompt: list[int], response: list[int]) -> list[float]:
    """Token log-probs from transformers' full float32 logits: the independent answer."""
    loaded = _loaded(model)
    with torch.inference_mode():
        logps = loaded(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    return [logps[len(prompt) + i - 1, token].item() for i, token in enumerate(response)]


@lru_cache(maxsize=4)
def _loaded(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def write_reference_cache(
    out: Path,
    pairs: Path,
    model: Path,
    *,
    drift: float = 1e-5,
    dtype: str = "float32",
    splits: Sequence[str] = ("train", "test"),
) -> Path:
    """A reference cache of `pairs` under `model`, without an engine, claiming `drift` nats a sequence (p99)."""
    responses = read_responses(pairs).filter(pl.col("split").is_in(splits))
    rows = logps_table(
        response_keys=responses["response_key"].to_list(),
        prompt_keys=responses["prompt_key"].to_list(),
        n_prompt_tokens=responses["prompt_ids"].list.len().to_list(),
        token_ids=responses["response_ids"].to_list(),
        token_logps=[plain_logps(model, *row) for row in responses.select("prompt_ids", "response_ids").iter_rows()],
    )
    publish_reference(out, rows, reference_identity(model, dtype="float32", quantization=None))
    (out / "drift.json").write_text(json.dumps({"trainer_dtype": dtype, "per_sequence": {"p99": drift}}))
    return out


def shift_row(folder: Path, key: bytes, nats: float) -> None:
    """Publish the reference cache in `folder` anew with the first token of one row less likely by `nats`."""
    reference = open_reference(folder, expect=None)
    rows = reference.scan().collect().to_dicts()
    for row in rows:
        if row["response_key"] == key:
            row["token_logps"][0] -= nats
    columns = {name: [row[name] for row in rows] for name in ("n_prompt_tokens", "token_ids", "token_logps")}
    table = logps_table(
        response_keys=[row["response_key"] for row in rows], prompt_keys=[row["prompt_key"] for row in rows], **columns
    )
    publish_reference(folder, table, reference.identity)
