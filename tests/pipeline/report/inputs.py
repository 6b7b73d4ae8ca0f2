"""Metric files as the stages write them, small and made up, for tests of the report."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.report.collect import write_report


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
