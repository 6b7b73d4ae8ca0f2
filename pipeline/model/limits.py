"""Which responses a model can take at all: token ids it has embeddings for, and lengths it has positions for."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import polars as pl

from pipeline.errors import RequestError
from pipeline.model.opening import open_config

# Where configs keep the longest sequence, as vLLM 0.32 looks for it; the smallest counts, Cohere's before all.
_LENGTHS = [
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions"),
    *("max_sequence_length", "max_seq_length", "seq_len"),
]
# Rotary kinds whose config states the scaled length itself; of the others it is the length before scaling.
_SCALED_ALREADY = {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
_BIASED = {"bloom", "mpt"}  # always ALiBi; Falcon by its config


class ModelLimits(NamedTuple):
    """vocabulary: rows of the embedding, above every id. positions: longest sequence, None where nothing bounds it.

    hint: a sentence on what sets that bound and what would raise it, or "".
    """

    vocabulary: int
    positions: int | None
    hint: str = ""


NO_LIMITS = ModelLimits(0, None)


def model_limits(folder: Path, *, trust_remote_code: bool = False) -> ModelLimits:
    """Read from config.json, with the architecture's defaults for what the file leaves out."""
    config = open_config(folder, trust_remote_code=trust_remote_code).get_text_config()
    lengths = {name: value for name in _LENGTHS if (value := getattr(config, name, None)) is not None}
    if (stated := getattr(config, "model_max_length", None)) is not None:
        lengths = {"model_max_length": stated}
    if not lengths:
        return ModelLimits(config.vocab_size, None)
    name = min(lengths, key=lengths.__getitem__)
    ropes = _ropes(getattr(config, "rope_parameters", None))
    positions = lengths[name]
    if "gemma3" not in config.model_type:  # states the scaled length, whatever its kind
        scales = [rope.get("factor") or 1.0 for rope in ropes if rope.get("rope_type") not in _SCALED_ALREADY]
        positions = int(positions * (scales[-1] if scales else 1.0))
    return ModelLimits(config.vocab_size, positions, _hint(config, name, positions, ropes))


def _ropes(parameters: Any) -> list[dict[str, Any]]:
    """The rotary parameters, one dict for each kind of layer that has its own."""
    if not isinstance(parameters, Mapping):
        return []
    nested = [dict(part) for part in parameters.values() if isinstance(part, Mapping)]
    return nested or [dict(parameters)]


def _hint(config: Any, name: str, positions: int, ropes: list[dict[str, Any]]) -> str:
    if config.model_type in _BIASED or getattr(config, "alibi", False):
        return (
            f"Its positions are a bias (ALiBi) without a limit of its own; vLLM reads {name}, and a larger one in "
            "config.json changes no number."
        )
    for rope in ropes:
        original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        if rope.get("rope_type") == "yarn" and original and factor and original * factor > positions:
            return (
                f"For yarn {name} is the scaled length, in vLLM as in transformers. Its config allows "
                f"{int(original * factor)} ({original} times {factor:g}): set {name} to that in config.json, which "
                "changes no other number."
            )
        if rope.get("rope_type") == "longrope":
            return f"longrope takes its scale from {name}, so a larger one in config.json would be another model."
    return ""


class UnscorableRow(NamedTuple):
    """A response that can't be scored. problem continues "Response KEY ..."; remedy is a sentence."""

    key: bytes
    problem: str
    remedy: str


class BadRows(Sequence[UnscorableRow]):
    """Rows that a model can't take, once each, in the order of what is wrong and of their keys; 30 bytes a row."""

    def __init__(
        self, parts: Iterable[pl.DataFrame] = (), limits: ModelLimits = NO_LIMITS, model: Path = Path()
    ) -> None:
        """parts: of rows with response_key, prompt_ids, response_ids; each is looked at once."""
        self._texts = [(problem, remedy) for _, _, problem, remedy in _rules(limits, model)]
        found = [_EMPTY, *(_broken(rows, limits, model) for rows in parts)]
        self._rows = pl.concat(found).sort("rule", "response_key")

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> UnscorableRow: ...
    @overload
    def __getitem__(self, place: slice) -> list[UnscorableRow]: ...
    def __getitem__(self, place: int | slice) -> UnscorableRow | list[UnscorableRow]:
        if isinstance(place, slice):
            return [self._row(*row) for row in self._rows[place].iter_rows()]
        return self._row(*self._rows.row(place))

    def __iter__(self) -> Iterator[UnscorableRow]:
        return (self._row(*row) for row in self._rows.iter_rows())

    @property
    def keys(self) -> pl.Series:
        return self._rows["response_key"]

    @property
    def remedies(self) -> list[str]:
        """Those of the rows, each once, in their order."""
        return list(dict.fromkeys(self._texts[rule][1] for rule in self._rows["rule"].unique().sort()))

    def _row(self, key: bytes, rule: int, value: int) -> UnscorableRow:
        problem, remedy = self._texts[rule]
        return UnscorableRow(key, problem.replace("{}", str(value), 1), remedy)


def bad_rows(rows: pl.DataFrame, limits: ModelLimits, model: Path) -> BadRows:
    """The rows that the model can't take.

    rows: with response_key, prompt_ids, response_ids. vLLM itself would lose a whole call over one row that is empty or
    too long, and hang on an id beyond the embeddings.
    """
    return BadRows([rows], limits, model)


def check_rows(rows: pl.DataFrame, limits: ModelLimits, model: Path) -> None:
    """Raise RequestError, naming the first offending response, unless the model can take every row; see bad_rows."""
    refuse_bad(bad_rows(rows, limits, model))


def refuse_bad(found: BadRows) -> None:
    """Raise RequestError, naming the first row, where there are any."""
    if found:
        more = f" {len(found) - 1} more rows can't be scored." if len(found) > 1 else ""
        raise RequestError(f"Response {found[0].key.hex()} {found[0].problem}. {found[0].remedy}{more}")


_EMPTY = pl.DataFrame(schema={"response_key": pl.Binary, "rule": pl.UInt8, "value": pl.Int64})


def _broken(rows: pl.DataFrame, limits: ModelLimits, model: Path) -> pl.DataFrame:
    """Of the rows that break a rule, once each: key, number of the first rule that is broken, and what it shows."""
    rules = list(_rules(limits, model))
    broken = pl.coalesce(pl.when(bad).then(pl.lit(number, pl.UInt8)) for number, (bad, *_) in enumerate(rules))
    values = pl.coalesce(pl.when(bad).then(value.cast(pl.Int64)) for bad, value, *_ in rules)
    found = rows.select("response_key", broken.alias("rule"), values.alias("value")).drop_nulls("rule")
    return found.unique("response_key", keep="first")


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
            f"Set prepare.max_tokens to {limits.positions} or less and run `dvc repro`. {limits.hint}".rstrip(),
        )
