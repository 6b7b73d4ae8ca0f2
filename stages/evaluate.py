"""The `evaluate` stage: one cell of the matrix of variants and seeds."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    from pipeline.params import Params


@click.command(name="evaluate")
@click.option("--variant", required=True, help="Name under train.variants.")
@click.option("--seed", type=click.IntRange(min=0), required=True, help="Seed that the policy was trained with.")
@path_option("--pairs", "Folder of pairs and responses from prepare; its test split is used.")
@path_option("--model", "Reference model from sft.")
@path_option("--policy", "Policy from train: a transformers folder or a peft adapter.")
@path_option("--reference", "Reference cache from score.")
@path_option("--metrics", "Metrics to write (JSON).")
@params_options
def command(
    params: "Params",
    variant: str,
    seed: int,
    pairs: Path,
    model: Path,
    policy: Path,
    reference: Path,
    metrics: Path,
) -> None:
    """Compare one policy with the reference on held-out pairs and on answers drawn from the policy.

    \b
    Example:
      refcache evaluate --variant dpo --seed 0 --pairs data/prepared/pairs --model models/reference \\
        --policy models/policies/dpo-0 --reference data/reference/logps --metrics results/dpo-0/evaluate.json
    """
    from pipeline.evaluation.evaluation import evaluate_policy

    summary = evaluate_policy(
        variant=variant,
        seed=seed,
        pairs=pairs,
        reference_model=model,
        policy=policy,
        reference=reference,
        metrics=metrics,
        params=params.evaluate,
        engine=params.score,
        beta=params.train.variant(variant).reward_beta,
        trust_remote_code=params.model.trust_remote_code,
    )
    click.echo(_line(summary))


def _line(summary: dict[str, Any]) -> str:
    parts = [
        f"evaluate {summary['variant']}-{summary['seed']}: {summary['pairs']:,} test pairs",
        f"reward accuracy {summary['rewards/accuracies']:.3f}",
        f"margin {summary['rewards/margins']:.3g}",
        f"dcr {summary['dcr']:.3f}",
    ]
    if summary["kl"] is not None:
        parts.append(f"KL {summary['kl']:.3g} nats over {summary['samples']:,} answers")
    if "expected_reward" in summary:
        reward = summary["expected_reward"]
        parts.append(f"expected reward {reward['policy']:.3g} (reference {reward['reference']:.3g})")
    return ", ".join(parts)
