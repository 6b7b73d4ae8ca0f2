"""Sampled answers to read beside each other: of each prompt the reference's and, per variant, one policy's.

Reads <folder>/<cell>/samples.parquet: prompt_key binary, prompt_text, author ("policy" or "reference"), sample, text,
n_tokens, policy_logp and reference_logp (summed, nats), true_reward (may be null).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.errors import RequestError

PROMPTS = 40  # on the page; those whose answers changed most
ANSWERS = 4  # of one author to one prompt
CHARACTERS = 4_000  # of one text
COLUMNS = {
    "prompt_key": pl.Binary,
    "prompt_text": pl.String,
    "author": pl.String,
    "sample": pl.Int32,
    "text": pl.String,
    "n_tokens": pl.Int32,
    "policy_logp": pl.Float64,
    "reference_logp": pl.Float64,
    "true_reward": pl.Float64,
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one policy makes of an answer: nats, and the implicit reward where its beta is known."""

    policy_logp: float | None
    log_ratio: float | None
    reward: float | None
    change: float | None  # |log-ratio| per token


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer; readings: by cell. Of a policy's answer only its own."""

    text: str
    left_out: int  # characters
    n_tokens: int | None
    reference_logp: float | None
    true_reward: float | None
    readings: dict[str, Reading] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt with its answers. changes: largest change per token by cell, None where nothing was measured."""

    key: str
    text: str
    left_out: int
    change: float | None
    changes: dict[str, float | None]
    reference: list[Answer]
    policies: dict[str, list[Answer]]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What the page shows. betas: of the cells with a column; without: cells that have no file."""

    prompts: list[Prompt]
    total: int
    betas: dict[str, float | None]
    without: tuple[str, ...]
    fewer_answers: bool  # some prompt has more answers of an author than are shown


def reward_beta(hyperparameters: Any) -> float | None:
    """Implicit reward per nat, out of train.json's hyperparameters; of a weighted sum the first beta of its terms."""
    if not isinstance(hyperparameters, Mapping):
        return None
    beta = hyperparameters.get("beta")
    if isinstance(beta, int | float) and not isinstance(beta, bool):
        return float(beta)
    terms = hyperparameters.get("terms")
    inner = [reward_beta(term.get("hyperparameters")) for term in terms] if isinstance(terms, list) else []
    return next((found for found in inner if found is not None), None)


def read_answers(folder: Path, betas: Mapping[str, float | None]) -> Reader | None:
    """The reader's content for the cells that `betas` names, or None where none has sampled answers.

    Raises RequestError for a file that is there and unreadable.
    """
    paths = {cell: folder / cell / "samples.parquet" for cell in betas}
    tables = [_read(path, cell) for cell, path in paths.items() if path.is_file()]
    table = pl.concat(tables) if tables else pl.DataFrame()
    if table.is_empty():
        return None
    present = [cell for cell in betas if cell in set(table["cell"])]
    ranked = (
        table.group_by("prompt_key", maintain_order=True)
        .agg(pl.col("change").max())
        .sort("change", descending=True, nulls_last=True, maintain_order=True)
    )
    kept = table.join(ranked.head(PROMPTS).select("prompt_key"), on="prompt_key", how="semi", maintain_order="left")
    by_prompt = {key[0]: rows for key, rows in kept.partition_by("prompt_key", as_dict=True).items()}
    counts = kept.group_by("cell", "prompt_key", "author").len()["len"]
    return Reader(
        prompts=[_prompt(key, by_prompt[key], change, betas, present) for key, change in ranked.head(PROMPTS).rows()],
        total=ranked.height,
        betas={cell: betas[cell] for cell in present},
        without=tuple(cell for cell in betas if cell not in present),
        fewer_answers=max(counts) > ANSWERS,
    )


def _read(path: Path, cell: str) -> pl.DataFrame:
    """The file's rows with `cell`, log_ratio (nats) and change (|log_ratio| per token); what is not finite is null."""
    try:
        table = pl.read_parquet(path, columns=list(COLUMNS)).select(pl.col(n).cast(t) for n, t in COLUMNS.items())
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).partition("\n")[0]  # polars adds its query plan
        raise RequestError(f"{path} is no table of sampled answers ({reason}); run `dvc repro -f evaluate`.") from None
    numbers = pl.col(pl.Float64)
    return (
        table.filter(pl.col("author").is_in(["policy", "reference"]))
        .with_columns(pl.when(numbers.is_finite()).then(numbers), pl.lit(cell).alias("cell"))
        .with_columns((pl.col("policy_logp") - pl.col("reference_logp")).alias("log_ratio"))
        .with_columns((pl.col("log_ratio").abs() / pl.col("n_tokens").clip(1)).alias("change"))
    )


def _prompt(
    key: bytes, table: pl.DataFrame, change: float | None, betas: Mapping[str, float | None], present: list[str]
) -> Prompt:
    rows = table.rows(named=True)
    text, left_out = _shortened(rows[0]["prompt_text"])
    policies: dict[str, list[Answer]] = {cell: [] for cell in present}
    # Every cell's file has the reference's answers; the same text is one answer, read by each policy.
    reference: dict[str, Answer] = {}
    for row in rows:
        answer = _answer(row)
        if row["author"] == "reference":
            answer = reference.setdefault(row["text"] or "", answer)
        else:
            policies[row["cell"]].append(answer)
        answer.readings.setdefault(row["cell"], _reading(row, betas[row["cell"]]))
    return Prompt(
        key=key.hex(),
        text=text,
        left_out=left_out,
        change=change,
        changes={cell: _largest(row["change"] for row in rows if row["cell"] == cell) for cell in present},
        reference=_most_changed(reference.values()),
        policies={cell: _most_changed(answers) for cell, answers in policies.items()},
    )


def _answer(row: Mapping[str, Any]) -> Answer:
    text, left_out = _shortened(row["text"])
    figures = {name: row[name] for name in ("n_tokens", "reference_logp", "true_reward")}
    return Answer(text=text, left_out=left_out, **figures)


def _reading(row: Mapping[str, Any], beta: float | None) -> Reading:
    ratio = row["log_ratio"]
    reward = None if ratio is None or beta is None else beta * ratio
    return Reading(policy_logp=row["policy_logp"], log_ratio=ratio, reward=reward, change=row["change"])


def _most_changed(answers: Iterable[Answer]) -> list[Answer]:
    """The ANSWERS answers with the largest changes, in the order in which they were drawn."""
    listed = list(answers)
    sizes = [_largest(reading.change for reading in answer.readings.values()) or 0.0 for answer in listed]
    kept = sorted(sorted(range(len(listed)), key=lambda index: -sizes[index])[:ANSWERS])
    return [listed[index] for index in kept]


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _shortened(text: str | None) -> tuple[str, int]:
    text = text or ""
    return text[:CHARACTERS], max(0, len(text) - CHARACTERS)
