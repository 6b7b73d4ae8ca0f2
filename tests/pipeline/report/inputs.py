"""Metric files as the stages write them, small and made up, for tests of the report."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.report.collect import write_report

MEASURES = ("reward_accuracy", "logp_accuracy", "token_logp_accuracy")
MEASURES += ("best_of_reward", "best_of_logp", "best_of_token_logp")


def write_inputs(
    root: Path, *, variants: Sequence[str] = ("dpo", "bdpo"), seeds: Sequence[int] = (0, 1), steps: int = 40
) -> Path:
    """Every file that the report reads, under `root` as in dvc.yaml."""
    write_json(root / "data/prepared/summary.json", prepared())
    write_json(root / "results/sft/metrics.json", {"steps": 564, "seconds": 71.3, "resumed_from_step": 0})
    write_json(root / "results/score/metrics.json", score())
    for place, variant in enumerate(variants):
        for seed in seeds:
            folder = root / f"results/{variant}-{seed}"
            write_json(folder / "train.json", train(variant, seed, steps))
            write_json(root / f"results/evaluate/{variant}-{seed}.json", evaluate(variant, seed, place))
            write_history(folder / "history.tsv", [history_row(step, steps, place) for step in range(1, steps + 1)])
    return root


def write_scores(root: Path, *, variants: Sequence[str] = ("dpo", "bdpo"), seeds: Sequence[int] = (0, 1)) -> Path:
    """Tasks and suites into the evaluations of `write_inputs`, as an evaluation with benchmarks writes them."""
    for place, variant in enumerate(variants):
        for seed in seeds:
            path = root / f"results/evaluate/{variant}-{seed}.json"
            change_json(path, tasks=tasks(seed, place), suites=suites(seed, place))
    return root


def write_answers(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A file of sampled answers; every row from `answer_row`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows, schema=ANSWER_SCHEMA).write_parquet(path)


def report(root: Path, *, variants: Sequence[str] = ("dpo", "bdpo"), seeds: Sequence[int] = (0, 1), **options) -> Path:
    """The page made from the files under `root`."""
    return write_report(
        prepared=root / "data/prepared/summary.json",
        sft=root / "results/sft/metrics.json",
        score=root / "results/score/metrics.json",
        results=root / "results",
        out=root / "report",
        variants=variants,
        seeds=seeds,
        **{"models": root / "models/policies", "reference": root / "data/reference/logps", **options},
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of an object in a file; `None` takes a key away."""
    content = json.loads(path.read_text()) | changes
    write_json(path, {name: value for name, value in content.items() if value is not None})


def write_history(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = ["\t".join(rows[0]), *("\t".join(str(value) for value in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def history_row(step: int, steps: int, place: int) -> dict[str, Any]:
    margin = (place + 1) * step / steps
    return {
        "step": step,
        "epoch": step / steps,
        "loss": math.log1p(math.exp(-margin)),
        "rewards/chosen": -0.3 * margin,
        "rewards/rejected": -1.3 * margin,
        "rewards/margins": margin,
        "rewards/accuracies": 0.5 + 0.1 * margin,
        "logps/chosen": -20 - 3 * margin,
        "logps/rejected": -27 - 13 * margin,
        "dcr": 0.4 + 0.1 * place,
        "nll/chosen": 1.1 + 0.1 * margin,
        "in_distribution_logp": -20.5,
        "grad_norm": 2.0,
        "lr": 1e-4,
        "tokens_per_second": 4200.0,
    }


def prepared() -> dict[str, Any]:
    return {
        "pairs": {"train": 1834, "test": 202},
        "prompts": {"train": 360, "test": 40},
        "distinct_responses": 1920,
        "sft_rows": 3000,
        "tokens": {"responses": 18342},
        "truncated_responses": 0,
        "truncated_prompts": 0,
        "dropped_prompts_too_long": 3,
        "train_prompts_also_in_test": 0,
        "duplicate_pairs": 12,
        "skipped_rows": {"count": 1, "examples": [{"where": "pairs.jsonl:17", "reason": "empty response"}]},
        "category_counts": {"addition": 1000, "reverse": 1036},
    }


def score() -> dict[str, Any]:
    return {
        "responses": 1920,
        "rows_scored": 96,
        "rows_reused": 1824,
        "tokens_scored": 1411,
        "response_tokens": 18342,
        "seconds": 12.8,
        "rows_per_second": 7.5,
        "tokens_per_second": 1321.4,
        "reference_id": "3f2a9c0d51b84e7790aa23c4d1e6f708",
        "drift": {
            "trainer_dtype": "float32",
            "responses": 64,
            "tokens": 612,
            "per_token": {"max": 2.9e-6, "mean": 3.1e-7, "p99": 1.9e-6},
            "per_sequence": {"max": 8.6e-6, "mean": 1.7e-6, "p99": 7.9e-6},
            "typical_margin": 6.42,
            "tolerance": 0.25,
            "flagged": 1,
            "rescored": {"rows": 1207, "keys": "9b1c"},
            "format_version": 2,
        },
    }


def train(variant: str, seed: int, steps: int) -> dict[str, Any]:
    return {
        "variant": variant,
        "seed": seed,
        "objective": "dpo",
        "hyperparameters": {"beta": 0.1},
        "steps": steps,
        "pairs": 1834,
        "tokens": 183_400,
        "seconds": 63.2,
        "tokens_per_second": 2901.9,
        "resumed_from_step": 0,
        "final": {"loss": 0.31},
    }


def evaluate(variant: str, seed: int, place: int) -> dict[str, Any]:
    return {
        "variant": variant,
        "seed": seed,
        "split": "test",
        "pairs": 202,
        "rewards/accuracies": 0.7 + 0.02 * seed + 0.05 * place,
        "rewards/margins": 1.1,
        "logps/accuracies": 0.63,
        "logps/chosen": -25.2,
        "logps/rejected": -38.6,
        "dcr": 0.4,
        "nll/chosen": 1.3,
        "in_distribution_logp": -22.1,
        "kl": 2.0 + place + 0.1 * seed,
        "kl_standard_error": 0.3,
        "samples": 256,
        "expected_reward": {
            "policy": 0.42 + 0.05 * place,
            "policy_standard_error": 0.02,
            "reference": 0.31,
            "reference_standard_error": 0.02,
        },
        "categories": {
            "addition": {"pairs": 120, "rewards/accuracies": 0.8, "rewards/margins": 1.2, "dcr": 0.3},
            "reverse": {"pairs": 82, "rewards/accuracies": 0.6, "rewards/margins": 0.9, "dcr": 0.5},
        },
        "reference": {"logps/accuracies": 0.61, "logps/chosen": -21.3, "logps/rejected": -26.9, "nll/chosen": 1.12},
    }


def tasks(seed: int, place: int) -> dict[str, Any]:
    """gsm8k: 0.3 of the reference; the variants 0.35 and 0.45 at seed 0, 0.02 more for each seed."""
    accuracy = {"value": 0.35 + 0.1 * place + 0.02 * seed, "standard_error": 0.03 + 0.01 * seed}
    perplexity = {"value": 12.5 - place, "standard_error": None, "higher_is_better": False}
    return {
        "gsm8k_cot_4shot": {
            "samples": 20,
            "metrics": {"exact_match,strict-match": accuracy | {"higher_is_better": True}},
            "reference": {
                "exact_match,strict-match": {"value": 0.3, "standard_error": 0.025, "higher_is_better": True}
            },
        },
        "wikitext": {
            "samples": 62,
            "metrics": {"word_perplexity,none": perplexity},
            "reference": {"word_perplexity,none": perplexity | {"value": 11.0}},
        },
    }


def suites(seed: int, place: int) -> dict[str, Any]:
    """rewardbench2 out of domain and held_out in it; accuracies rise with the variant, the seed and the measure."""

    def statistic(value: float) -> dict[str, float]:
        return {"value": value, "standard_error": 0.02, "low": value - 0.04, "high": value + 0.04}

    def measures(base: float, names: Sequence[str] = MEASURES) -> dict[str, Any]:
        shift = 0.05 * place + 0.02 * seed
        return {name: statistic(base + shift + 0.01 * index) for index, name in enumerate(names)}

    base = {name: statistic(0.5) for name in MEASURES if "reward" not in name}
    counts = {"pairs": 300, "prompts": 100, "rows": 100}
    categories = {name: {"rows": 10 + index, **measures(0.4)} for index, name in enumerate(("Factuality", "Focus"))}
    return {
        "rewardbench2": {"domain": "out", **counts, **measures(0.6), "reference": base, "categories": categories},
        "held_out": {"domain": "in", **counts, **measures(0.7), "reference": base},
    }


ANSWER_SCHEMA = {
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


def answer_row(prompt: str, **changes: Any) -> dict[str, Any]:
    """A policy's answer of 10 tokens that gained 2 nats."""
    row = {"prompt_key": prompt.encode(), "prompt_text": f"Question {prompt}?", "author": "policy", "sample": 0}
    row |= {"text": f"policy on {prompt}", "n_tokens": 10, "policy_logp": -10.0, "reference_logp": -12.0}
    return row | {"true_reward": None} | changes
