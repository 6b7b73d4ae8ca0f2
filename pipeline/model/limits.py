"""Which responses a model can take at all: token ids it has embeddings for, and lengths it has positions for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from pipeline.errors import RequestError
from pipeline.model.opening import open_config


class ModelLimits(NamedTuple):
    """vocabulary: rows of the embedding, above every id. positions: longest sequence, None where nothing bounds it."""

    vocabulary: int
    positions: int | None


def model_limits(folder: Path, *, trust_remote_code: bool = False) -> ModelLimits:
    """Read from config.json, with the architecture's defaults for what the file leaves out."""
    config = open_config(folder, trust_remote_code=trust_remote_code).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if positions and rope.get("rope_type") in ("linear", "dynamic"):
        positions = int(positions * rope.get("factor", 1.0))  # the other kinds state the scaled length themselves
    return ModelLimits(config.vocab_size, positions)


class UnscorableRow(NamedTuple):
    """A response that can't be scored. problem continues "Response KEY ..."; remedy is a sentence."""

    key: bytes
    problem: str
    remedy: str


def bad_rows(rows: pl.DataFrame, limits: ModelLimits, model: Path) -> list[UnscorableRow]:
    """The rows that the model can't take, once each, in the order of what is wrong and of their keys.

    rows: with response_key, prompt_ids, response_ids. vLLM itself would lose a whole call over one row that is empty or
    too long, and hang on an id beyond the embeddings.
    """
    found: dict[bytes, UnscorableRow] = {}
    for bad, value, problem, remedy in _rules(limits, model):
        for key, number in rows.filter(bad).select("response_key", value).sort("response_key").iter_rows():
            found.setdefault(key, UnscorableRow(key, problem.replace("{}", str(number), 1), remedy))
    return list(found.values())


def check_rows(rows: pl.DataFrame, limits: ModelLimits, model: Path) -> None:
    """Raise RequestError, naming the first offending response, unless the model can take every row; see bad_rows."""
    if found := bad_rows(rows, limits, model):
        more = f" {len(found) - 1} more rows can't be scored." if len(found) > 1 else ""
        raise RequestError(f"Response {found[0].key.hex()} {found[0].problem}. {found[0].remedy}{more}")


def _rules(limits: ModelLimits, model: Path) -> Iterator[tuple[pl.Expr, pl.Expr, str, str]]:
    """(which rows are bad, a number to show for {}, problem, remedy)."""
    prompt, response = pl.col("prompt_ids"), pl.col("response_ids")
    length = (prompt.list.len() + response.list.len()).alias("value")
    smallest = pl.min_horizontal(prompt.list.min(), response.list.min())
    largest = pl.max_horizontal(prompt.list.max(), response.list.max())
    prepare_again = "Run `dvc repro -f prepare`."
    yield prompt.list.len() == 0, length, "has no prompt token, and its first token needs one before it", prepare_again
    yield response.list.len() == 0, length, "has no response token, so there is nothing to score", prepare_again
    yield (
        (smallest < 0) | (largest >= limits.vocabulary),
        pl.when(smallest < 0).then(smallest).otherwise(largest).alias("value"),
        f"has token id {{}}, but {model} has {limits.vocabulary} embeddings (ids 0 to {limits.vocabulary - 1})",
        "It was tokenised for another model; run `dvc repro`.",
    )
    if limits.positions is not None:
        yield (
            length > limits.positions,
            length,
            f"has {{}} tokens with its prompt, but {model} has {limits.positions} positions",
            f"Set prepare.max_tokens to {limits.positions} or less and run `dvc repro`.",
        )
