"""The sample stage: answers of the reference to train prompts, scored, and paired as training data."""

import json
import os
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.data.tables import PAIRS_SCHEMA, RESPONSES_SCHEMA, read_pairs, read_responses, write_table
from pipeline.engine.process import orderly_termination
from pipeline.engine.rows import Sampling, engine_length, longest_prompt, token_arrays
from pipeline.errors import RequestError
from pipeline.evaluation.sampling import stop_token_ids
from pipeline.files import write_json
from pipeline.model.limits import model_limits
from pipeline.model.tokenizer import open_tokenizer
from pipeline.params import PrepareParams, SampleParams, ScoreParams
from pipeline.policies.answers import Answers, answer_rows, on_demand
from pipeline.progress import activity
from pipeline.reference.identity import reference_identity
from pipeline.sampled.pairing import choose_pairs
from pipeline.sampled.prompts import prompts_to_sample
from pipeline.sampled.rewards import Dialogue, reward_scores
from pipeline.sampled.scorers import Asked, text_scorer

SOURCE = "sampled"


def sample_pairs(
    *,
    params: SampleParams,
    prepare: PrepareParams,
    engine: ScoreParams,
    pairs: Path,
    model: Path,
    tokenizer: Path,
    out: Path,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write OUT/pairs (prepared tables), answers.parquet, rows.jsonl and summary.json; returns the summary.

    pairs: prepared; their test split is taken over unchanged. The responses' token ids are those that were sampled.
    With scorer none OUT holds summary.json alone. Answers are journalled, so a killed run goes on where it was. Raises
    RequestError as the scorers do, and where no pair is left; then OUT is as it was. RunFailed if the engine dies.
    """
    if params.scorer == "none":
        summary: dict[str, Any] = {"scorer": "none"}
        _replace(out, None, summary)
        return summary
    score_text = None if params.scorer == "reward_model" else text_scorer(params)  # refuses before anything is sampled
    prompts = prompts_to_sample(params, prepare, pairs=pairs, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    opened = open_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    with orderly_termination():
        answers = _drawn(params, engine, prompts, pairs=pairs, model=model, trust_remote_code=trust_remote_code)
        texts = opened.batch_decode(answers["response_ids"].to_list(), skip_special_tokens=True)
        columns = (answers["prompt_text"], texts, answers["reference"])
        asked = [Asked(*row) for row in zip(*columns, strict=True)]
        with activity(f"scoring {len(asked):,} answers by {params.scorer}"):
            if score_text is not None:
                scores = score_text(asked)
            else:
                ids = token_arrays(answers["prompt_ids"])
                dialogues = [Dialogue(row.prompt, prompt) for row, prompt in zip(asked, ids, strict=True)]
                options = {"tokenizer": opened, "engine": engine, "trust_remote_code": trust_remote_code}
                scores = reward_scores(asked, dialogues, folder=Path(params.reward_model or ""), **options)
    answers = answers.with_columns(pl.Series("response_text", texts), pl.Series("score", scores, dtype=pl.Float64))
    chosen, counts = _paired(answers, params)
    if chosen.is_empty():
        raise RequestError(
            f"no prompt has answers that differ in score by more than sample.min_gap ({params.min_gap:g}): of "
            f"{counts['prompts']} prompts {counts['prompts_all_alike']} score all alike. Raise sample.n or "
            "sample.temperature, lower sample.min_gap, or choose another sample.scorer. Nothing was written; what was "
            "sampled is kept."
        )
    summary = {"scorer": params.scorer, **counts, "score_mean": float(np.mean(scores))}
    summary |= {
        "score_of_chosen": chosen["chosen_reward"].mean(),
        "score_of_rejected": chosen["rejected_reward"].mean(),
    }
    staged = _staged(out)
    try:
        _write_pairs(staged / "pairs", chosen, answers, pairs)
        answers.drop("category").write_parquet(staged / "answers.parquet")
        _write_rows(staged / "rows.jsonl", chosen)
        _replace(out, staged, summary)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return summary


def _drawn(
    params: SampleParams,
    engine: ScoreParams,
    prompts: pl.DataFrame,
    *,
    pairs: Path,
    model: Path,
    trust_remote_code: bool,
) -> pl.DataFrame:
    """`params.n` consecutive rows a prompt: the prompt's columns, sample, response_ids, response_key, truncated."""
    limits = model_limits(model, trust_remote_code=trust_remote_code)
    longest = longest_prompt(prompts) + params.max_new_tokens
    if limits.positions is not None and longest > limits.positions:
        raise RequestError(
            f"sample.max_new_tokens is {params.max_new_tokens}, and the longest prompt has "
            f"{longest - params.max_new_tokens} tokens, but the model has {limits.positions} positions. Set it to "
            f"{limits.positions - longest + params.max_new_tokens} or less."
        )
    stop = stop_token_ids(model, read_responses(pairs), trust_remote_code=trust_remote_code)
    sampling = Sampling(params.n, params.max_new_tokens, params.temperature, params.top_p, tuple(stop))
    length = engine_length(longest, limits, engine, what="prompts with sampled answers")
    with activity(f"digesting {model}"):
        identity = reference_identity(model, dtype=engine.dtype, quantization=engine.quantization)
    with (
        on_demand(engine, model, length, log="sample", sampling=True, trust_remote_code=trust_remote_code) as ask,
        Answers(identity, "reference", rows_per_call=engine.rows_per_call) as book,
    ):
        # Seeds by the prompt's own key, so that more prompts change nothing about the answers to these.
        seeds = [_seed(params.seed, key) for key in prompts["prompt_key"]]
        found = book.draw(token_arrays(prompts["prompt_ids"]), sampling, seeds, ask, "answers")
    rows = answer_rows(prompts, found)
    last = pl.col("response_ids").list.last()
    return rows.with_columns(
        pl.Series("sample", np.tile(np.arange(params.n, dtype=np.int32), len(prompts))),
        (~last.is_in(stop)).alias("truncated"),
    )


def _seed(seed: int, key: bytes) -> int:
    """vLLM gives answer i the seed and i more; 48 bits keep prompts apart."""
    return (seed << 48 ^ int.from_bytes(key[:6], "little")) % (1 << 62)


def _paired(answers: pl.DataFrame, params: SampleParams) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Pairs in the columns of PAIRS_SCHEMA but for split and pair_id; and counts."""
    rows: list[dict[str, Any]] = []
    counts = {
        "prompts": 0,
        "answers": len(answers),
        "answers_without_text": 0,
        "answers_cut": 0,
        "prompts_all_alike": 0,
    }
    counts["answers_cut"] = int(answers["truncated"].sum())
    for (key,), of_prompt in answers.group_by("prompt_key", maintain_order=True):
        usable = of_prompt.filter(pl.col("response_text").str.strip_chars() != "")
        counts["prompts"] += 1
        counts["answers_without_text"] += len(of_prompt) - len(usable)
        found = choose_pairs(
            usable["score"].to_list(),
            usable["response_text"].to_list(),
            rule=params.pairs,
            min_gap=params.min_gap,
            seed=_seed(params.seed, key) % (1 << 32),
        )
        counts["prompts_all_alike"] += not found
        for better, worse in found:
            chosen, rejected = usable.row(better, named=True), usable.row(worse, named=True)
            rows.append(
                {
                    "prompt_key": key,
                    "chosen_key": chosen["response_key"],
                    "rejected_key": rejected["response_key"],
                    "category": chosen["category"],
                    "prompt_text": chosen["prompt_text"],
                    "chosen_text": chosen["response_text"],
                    "rejected_text": rejected["response_text"],
                    "chosen_reward": chosen["score"],
                    "rejected_reward": rejected["score"],
                    "source": f"{SOURCE}[{key.hex()[:12]}:{chosen['sample']},{rejected['sample']}]",
                }
            )
    counts["pairs"] = len(rows)
    return pl.DataFrame(rows, infer_schema_length=None), counts


def _write_pairs(folder: Path, chosen: pl.DataFrame, answers: pl.DataFrame, prepared: Path) -> None:
    """The sampled pairs as the train split, and the prepared test split behind them."""
    test = read_pairs(prepared, "test")
    names = [name for name in PAIRS_SCHEMA.names if name != "pair_id"]
    table = pl.concat(
        [chosen.with_columns(split=pl.lit("train")).select(names), test.select(names)], how="vertical_relaxed"
    ).with_row_index("pair_id")
    write_table(table.select(PAIRS_SCHEMA.names).to_arrow().cast(PAIRS_SCHEMA), folder / "pairs.parquet", PAIRS_SCHEMA)
    used = pl.concat([chosen["chosen_key"], chosen["rejected_key"]]).unique().implode()
    sampled = answers.filter(pl.col("response_key").is_in(used)).unique("response_key", keep="first")
    sampled = sampled.with_columns(split=pl.lit("train"), reward=pl.col("score").cast(pl.Float32))
    held_out = read_responses(prepared, "test")
    rows = pl.concat([sampled.select(RESPONSES_SCHEMA.names), held_out.select(RESPONSES_SCHEMA.names)])
    responses: pa.Table = rows.sort("response_key").to_arrow().cast(RESPONSES_SCHEMA)
    write_table(responses, folder / "responses.parquet", RESPONSES_SCHEMA)


def _write_rows(file: Path, chosen: pl.DataFrame) -> None:
    """The sampled pairs as rows that `prepare` and other trainers read."""
    names = {"prompt_text": "prompt", "chosen_text": "chosen", "rejected_text": "rejected"}
    columns = [*names.values(), "chosen_reward", "rejected_reward", "category"]
    rows = chosen.rename(names).select(columns).to_dicts()
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _staged(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return Path(mkdtemp(prefix=f".{out.name}.", dir=out.parent))


_WRITTEN = ("pairs", "answers.parquet", "rows.jsonl")


def _replace(out: Path, staged: Path | None, summary: dict[str, Any]) -> None:
    """What was written takes its place in OUT; summary.json comes last."""
    out.mkdir(parents=True, exist_ok=True)
    for name in _WRITTEN:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if staged is not None:
            os.replace(staged / name, path)
    write_json(out / "summary.json", summary, indent=2)
