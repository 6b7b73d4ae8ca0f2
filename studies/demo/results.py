"""What the demo study measured, class by class: means and differences, with intervals over seeds and over prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import polars as pl
from ruamel.yaml import YAML

from pipeline.params import Params
from studies.pages.intervals import Floats, Mean, clustered_interval, mean_interval
from studies.pages.runs import REFERENCE, Cells, with_rewards
from studies.pages.settings import Section


class PolicyClass(Section):
    """One entry of classes.yaml; `trainable` is YAML in a string, as --set takes it."""

    name: str
    title: str
    trainable: str
    sketch: Literal["tensorsketch", "exact"]
    k: int
    learning_rate: float
    null_weight_absolute: float

    @property
    def overrides(self) -> tuple[str, ...]:
        return (
            f"trainable={self.trainable}",
            f"sketch.mode={self.sketch}",
            f"sketch.k={self.k}",
            f"train.learning_rate={self.learning_rate}",
            f"train.variants.auxdpo.null_weight_absolute={self.null_weight_absolute}",
        )


class DemoStudy(Section):
    classes: list[PolicyClass]


class Metric(NamedTuple):
    title: str
    unit: str
    digits: int


METRICS = {
    "reward": Metric("expected reward", "of an answer, −1 to 3", 3),
    "accuracy": Metric("reward accuracy", "share of held-out pairs", 3),
    "kl": Metric("KL to the reference", "nats an answer", 2),
    "value": Metric("E[r] − β KL", "what the objectives maximise", 3),
    "dcr": Metric("degraded chosen (dcr)", "share of held-out pairs", 3),
}
OF_ANSWERS = ("reward", "kl", "value")  # the others are of pairs


class Estimate(NamedTuple):
    """A figure with two 95 % intervals: over seeds, for these very prompts; over prompts, for these very policies."""

    seeds: Mean
    prompts: Mean

    @property
    def value(self) -> float:
        return self.prompts.value

    @property
    def half(self) -> float:
        """Half the width of the wider interval."""
        return max(self.seeds.half, self.prompts.half)

    @property
    def sign(self) -> int:
        """1 where both intervals lie above zero, -1 where both lie below, else 0; 0 with one seed only."""
        if all(mean.low > 0 for mean in self):
            return 1
        return -1 if all(mean.high < 0 for mean in self) else 0

    def show(self, digits: int) -> str:
        """`0.652 ± 0.010 ± 0.045`: seeds first."""
        return f"{self.value:.{digits}f} ± {self.seeds.half:.{digits}f} ± {self.prompts.half:.{digits}f}".replace(
            "-", "−"
        )


Term = tuple[float, str, str]  # factor, class, variant


class Results:
    """Every policy of every class on the held-out pairs and prompts."""

    def __init__(self, pairs: Mapping[str, Cells], answers: Mapping[str, Cells]) -> None:
        """By class: of tables as `with_rewards` gives them, and as `with_values` does."""
        self.pairs, self.answers = pairs, answers

    def estimate(self, name: str, variant: str, metric: str) -> Estimate:
        """The mean over seeds and prompts of one variant of the class `name`."""
        return self.contrast(metric, (1.0, name, variant))

    def difference(self, name: str, one: str, other: str, metric: str) -> Estimate:
        """The mean of `one` less `other`, seed by seed and prompt by prompt."""
        return self.contrast(metric, (1.0, name, one), (-1.0, name, other))

    def contrast(self, metric: str, *terms: Term) -> Estimate:
        """The sum of factor * figure; seeds and prompts are paired before intervals are taken."""
        tables = self.answers if metric in OF_ANSWERS else self.pairs
        seeds = _sum([factor * tables[name].by_seed(variant, metric) for factor, name, variant in terms])
        of_pairs = [tables[name].by_pair(variant, metric) for _, name, variant in terms]
        total = _sum([term[0] * values for term, (values, _) in zip(terms, of_pairs, strict=True)])
        return Estimate(mean_interval(seeds), clustered_interval(total, of_pairs[0][1]))


def _sum(parts: Sequence[Floats]) -> Floats:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def with_values(answers: pl.DataFrame, params: Params) -> pl.DataFrame:
    """answers.parquet with E[r] - beta KL per prompt, and prompts numbered for `Cells`; the reference's KL is 0."""
    betas = {REFERENCE: 0.0} | {name: variant.reward_beta for name, variant in params.train.variants.items()}
    beta = pl.col("variant").replace_strict(betas, return_dtype=pl.Float64)
    return answers.with_columns(
        (pl.col("reward") - beta * pl.col("kl")).alias("value"),
        pl.col("prompt_key").rank("dense").alias("pair_id"),
    )


def load_results(run: Path, classes: Sequence[PolicyClass], params: Params) -> Results:
    """From the folder of the study's outputs."""
    names = [each.name for each in classes]
    read = {
        what: {name: pl.read_parquet(run / "measured" / name / f"{what}.parquet") for name in names}
        for what in ("pair_logps", "answers")
    }
    return Results(
        {name: Cells(with_rewards(table, params), "test") for name, table in read["pair_logps"].items()},
        {name: Cells(with_values(table, params), "test") for name, table in read["answers"].items()},
    )


def parse_trainable(text: str) -> object:
    """As --set reads it."""
    return YAML(typ="safe", pure=True).load(text)
