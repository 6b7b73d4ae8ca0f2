"""The `train` stage: one cell of the matrix of variants and seeds."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    from pipeline.params import Params


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
        from pipeline.runs.memory_plan import plan_memory

        loop, objective = variant_loop(params.train, variant), params.train.variant(variant)
        plan = plan_memory(model, pairs, loop, params.trainable, objective=objective, sketches=sketches)
        for line in plan.lines():
            click.echo(line)
        return
    from pipeline.runs.policy import train_policy

    train_policy(
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
    )
