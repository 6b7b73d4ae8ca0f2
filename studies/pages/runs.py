"""What the pages of both studies read from a run: its cells as tables, its sizes and times as text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.params import Params
from pipeline.report.numbers import show_count, show_seconds
from studies.pages.intervals import Floats, Mean, clustered_interval, mean_interval

REFERENCE = "reference"  # the name under which pair_logps writes the reference's own forward


def read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    assert isinstance(content, dict)
    return content


def with_rewards(values: pl.DataFrame, params: Params) -> pl.DataFrame:
    """pair_logps.parquet with log-ratios in nats and, in units of reward, accuracy, margin and dcr per pair."""
    betas = pl.DataFrame(
        [{"variant": REFERENCE, "beta": 0.0}]
        + [{"variant": name, "beta": variant.reward_beta} for name, variant in params.train.variants.items()]
    )
    ratios = values.join(betas, on="variant", how="left", maintain_order="left").with_columns(
        (pl.col("chosen") - pl.col("ref_chosen")).alias("chosen_ratio"),
        (pl.col("rejected") - pl.col("ref_rejected")).alias("rejected_ratio"),
    )
    return ratios.with_columns(
        (pl.col("chosen_ratio") > pl.col("rejected_ratio")).cast(pl.Float64).alias("accuracy"),
        (pl.col("beta") * (pl.col("chosen_ratio") - pl.col("rejected_ratio"))).alias("margin"),
        (pl.col("chosen_ratio") < 0).cast(pl.Float64).alias("dcr"),
    )


class Cells:
    """The pairs of one split under every policy."""

    def __init__(self, values: pl.DataFrame, split: str) -> None:
        """values: as `with_rewards` gives them."""
        self.values = values.filter(pl.col("split") == split).sort("pair_id")

    def over_seeds(self, variant: str, column: str) -> Mean:
        """The interval is of the mean over seeds, for these very pairs: what another batch order would change."""
        return mean_interval(self.by_seed(variant, column))

    def over_prompts(self, variant: str, column: str) -> Mean:
        """The interval is over prompts, for the mean of these very seeds: what other data would change."""
        return clustered_interval(*self.by_pair(variant, column))

    def by_seed(self, variant: str, column: str) -> Floats:
        """One value a seed, the mean over pairs; seeds in ascending order, hence the same for every variant."""
        found = self._of(variant).group_by("seed").agg(pl.col(column).mean()).sort("seed")
        return found[column].to_numpy().astype(float)

    def by_pair(self, variant: str, column: str) -> tuple[Floats, list[bytes]]:
        """One value a pair, the mean over seeds, and the pairs' prompts; pairs in the same order for every variant."""
        table = self._of(variant).group_by("pair_id", maintain_order=True)
        found = table.agg(pl.col(column).mean(), pl.col("prompt_key").first())
        return found[column].to_numpy().astype(float), found["prompt_key"].to_list()

    def _of(self, variant: str) -> pl.DataFrame:
        return self.values.filter(pl.col("variant") == variant)


def describe_sizes(params: Params, summary: dict[str, Any], model: Path) -> list[str]:
    """What the run was, as lines of a Markdown list."""
    train = params.train
    return [
        *describe_data(params, summary, model),
        f"- training: {train.epochs:g} epochs, batches of {train.batch_size} pairs, learning rate "
        f"{train.learning_rate:g} ({train.schedule}, {100 * train.warmup_share:g} % warm-up), {train.dtype}, all "
        f"weights, {train.ranks} rank{'s' if train.ranks > 1 else ''}; seeds "
        f"{', '.join(map(str, params.sweep.seeds))}, which change the batch order and nothing else",
    ]


def describe_data(params: Params, summary: dict[str, Any], model: Path) -> list[str]:
    """The reference and the pairs, as lines of a Markdown list."""
    prepare = params.prepare
    pairs, prompts = summary["pairs"], summary["prompts"]
    config = read_json(model / "config.json")
    return [
        f"- reference: {count_parameters(model) / 1e6:.2f} M parameters, {config['num_hidden_layers']} layers of "
        f"{config['hidden_size']}, vocabulary {show_count(config['vocab_size'])}, {params.sft.epochs:g} epochs of sft",
        f"- data: {show_count(pairs['train'])} training pairs over {show_count(prompts['train'])} prompts, "
        f"{show_count(pairs['test'])} held-out pairs over {show_count(prompts['test'])}; prompts of at most "
        f"{prepare.max_prompt_tokens} tokens, responses cut where prompt and response reach {prepare.max_tokens} "
        f"({show_count(summary['truncated_responses'])} of {show_count(summary['distinct_responses'])} were cut)",
    ]


def count_parameters(model: Path) -> int:
    """From the files' headers; tied weights are stored once."""
    from math import prod

    from safetensors import safe_open

    total = 0
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as weights:
            total += sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def describe_times(run: Path, cells: Sequence[str]) -> str:
    """Seconds inside the stages, without the seconds that processes take to start."""
    sft, score = (read_json(run / name / "metrics.json")["seconds"] for name in ("sft", "score"))
    train = [read_json(run / "cells" / cell / "train.json")["seconds"] for cell in cells]
    return (
        f"sft {show_seconds(sft)}; score {show_seconds(score)}, once; {len(train)} trainings, "
        f"{show_seconds(sum(train) / len(train))} each on average"
    )


def sweep_totals(content: dict[str, Any], cells: int) -> dict[str, dict[str, float]]:
    """Seconds (wall, cpu) of the whole sweep, from cost.json of one cell.

    cached: with the reference cache; anew: the reference scored for every cell; online: forwarded while training.
    """
    return {
        name: {kind: content["train"][kind] * cells + extra * content[what][kind] for kind in ("wall", "cpu")}
        for name, what, extra in (("cached", "score", 1), ("anew", "score", cells), ("online", "online", cells))
    }
