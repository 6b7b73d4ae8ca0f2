"""The `train` stage: one cell of the matrix of variants and seeds."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.options import params_options, path_option
from stages.tables import show_bytes

if TYPE_CHECKING:
    from pipeline.params import Params
    from pipeline.runs.memory_plan import MemoryPlan


@click.command(name="train")
@click.option("--variant", required=True, help="Name under train.variants.")
@click.option("--seed", type=click.IntRange(min=0), required=True, help="Seed of the batch order.")
@path_option("--pairs", "Folder of pairs and responses from prepare.")
@path_option("--model", "Reference model from sft, where the policy starts.")
@path_option("--reference", "Reference cache from score.")
@click.option(
    "--sketches",
    type=click.Path(path_type=Path),
    help="Gradient sketches from sketch; only objective auxdpo reads them.",
)
@path_option("--out", "Policy to write: a transformers folder, or a peft adapter for LoRA.")
@path_option("--history", "Training history to write (TSV).")
@path_option("--metrics", "Metrics to write (JSON).")
@click.option("--dry-run", is_flag=True, help="Print the memory that each rank would take, by part; train nothing.")
@params_options
def command(
    params: "Params",
    variant: str,
    seed: int,
    pairs: Path,
    model: Path,
    reference: Path,
    sketches: Path | None,
    out: Path,
    history: Path,
    metrics: Path,
    dry_run: bool,
) -> None:
    """Train one policy against the reference cache with DeepSpeed; no reference model is loaded.

    A killed run goes on from its newest checkpoint when the same command runs again. Held-out pairs, if
    train.evaluate_every asks for them, are measured into evaluations.tsv beside the history. Objective auxdpo writes
    its offsets to offsets.parquet in the policy's folder. Under torchrun or srun each process is one rank.

    \b
    Example:
      refcache train --variant dpo --seed 0 --pairs data/prepared/pairs --model models/reference \\
        --reference data/reference/logps --sketches data/reference/sketches --out models/policies/dpo-0 \\
        --history results/dpo-0/history.tsv --metrics results/dpo-0/train.json
    """
    if dry_run:
        from pipeline.params import variant_loop
        from pipeline.runs.memory_plan import STAGE_BYTES, plan_memory

        loop, objective = variant_loop(params.train, variant), params.train.variant(variant)
        plan = plan_memory(
            model,
            pairs,
            loop,
            params.trainable,
            objective=objective,
            sketches=sketches,
            trust_remote_code=params.model.trust_remote_code,
        )
        click.echo("\n".join(_lines(plan, STAGE_BYTES)))
        return
    from pipeline.report.numbers import show_trained
    from pipeline.runs.policy import train_policy

    summary = train_policy(
        variant=variant,
        seed=seed,
        pairs=pairs,
        model=model,
        reference=reference,
        sketches=sketches,
        out=out,
        history=history,
        metrics=metrics,
        params=params.train,
        trainable=params.trainable,
        trust_remote_code=params.model.trust_remote_code,
    )
    if summary:  # empty where another process is rank 0
        click.echo(f"train: {variant}-{seed}: trained {show_trained(summary)}{_weight(summary.get('offsets', {}))}")


def _weight(offsets: dict[str, float]) -> str:
    """Of AuxDPO's penalty, in both units: the same number has meant either."""
    names = ("null_weight", "null_weight_absolute")
    told = [f"{name} {offsets[name]:.4g}" for name in names if name in offsets]
    return f"; offsets held by {', '.join(told)}" if told else ""


def _lines(plan: "MemoryPlan", stage_bytes: int) -> list[str]:
    shown = [*plan.parts.items(), ("total on each rank", plan.total)]
    return [
        f"{plan.parameters:,} parameters, {plan.trained:,} of them trained; largest micro-batch of a rank: "
        f"{plan.micro_batch_tokens:,} tokens ({plan.layout})",
        *(f"{name:<26}{show_bytes(size):>10}" for name, size in shown),
        f"beside the ranks: {show_bytes(stage_bytes)} of the stage that started them",
        f"not held: {show_bytes(plan.reference)} of reference weights, and a forward pass of them over every batch",
    ]
