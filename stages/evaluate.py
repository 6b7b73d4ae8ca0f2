"""The `evaluate` stage: all cells of the sweep, or one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    from pipeline.evaluation.questions import Cell
    from pipeline.params import Params


@click.command(name="evaluate")
@path_option("--pairs", "Folder of pairs and responses from prepare; its test split is used.")
@path_option("--model", "Reference model from sft.")
@path_option("--reference", "Reference cache from score.")
@click.option("--suites", type=click.Path(path_type=Path), help="Prepared suites; with --suites-reference.")
@click.option("--suites-reference", type=click.Path(path_type=Path), help="Their reference cache from score.")
@click.option("--policies", type=click.Path(path_type=Path), help="Folder of VARIANT-SEED/ policies; with --out.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for VARIANT-SEED.json of every cell of the sweep.")
@click.option("--answers", type=click.Path(path_type=Path), help="Folder for the answers that were read, as Parquet.")
@click.option("--variant", help="One cell alone: name under train.variants; with --seed, --policy and --metrics.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed that the policy was trained with.")
@click.option("--policy", type=click.Path(path_type=Path), help="Policy from train: transformers folder or adapter.")
@click.option("--metrics", type=click.Path(path_type=Path), help="Metrics of that cell to write (JSON).")
@params_options
def command(
    params: "Params",
    pairs: Path,
    model: Path,
    reference: Path,
    suites: Path | None,
    suites_reference: Path | None,
    policies: Path | None,
    out: Path | None,
    answers: Path | None,
    variant: str | None,
    seed: int | None,
    policy: Path | None,
    metrics: Path | None,
) -> None:
    """Compare policies with the reference on held-out pairs, on answers drawn from each policy, and on suites.

    Every cell of sweep.variants and sweep.seeds in one engine; what was measured before is not measured again.

    \b
    Examples:
      refcache evaluate --pairs data/prepared/pairs --model models/reference --reference data/reference/logps \\
        --policies models/policies --out results/evaluate --answers results/answers \\
        --suites data/prepared/suites --suites-reference data/reference/suites
      refcache evaluate --variant dpo --seed 0 --pairs data/prepared/pairs --model models/reference \\
        --policy models/policies/dpo-0 --reference data/reference/logps --metrics dpo-0.json
    """
    from pipeline.evaluation.cells import evaluate_cells

    if (suites is None) != (suites_reference is None):
        raise click.UsageError("--suites (prepared suites) and --suites-reference (their log-probs) go together")
    if params.evaluate.suites and suites is None:
        raise click.UsageError(
            f"evaluate.suites names {', '.join(params.evaluate.suites)}: give --suites and --suites-reference, where "
            "`refcache suites` and `refcache score` put them, or --set evaluate.suites={}"
        )
    one = _one_cell(params, answers, variant=variant, seed=seed, policy=policy, metrics=metrics)
    cells = [one] if one else _all_cells(params, policies, out, answers)
    done = evaluate_cells(
        cells,
        pairs=pairs,
        reference_model=model,
        reference=reference,
        params=params.evaluate,
        engine=params.score,
        suites=suites,
        suites_reference=suites_reference,
        trust_remote_code=params.model.trust_remote_code,
    )
    for summary in done.cells.values():
        click.echo(_line(summary))
    if not one:
        _remove_others(out, answers, cells)
        click.echo(f"evaluate: {len(cells)} cells, {done.asked} with something new to measure, {done.starts} engines")


def _one_cell(params: "Params", answers: Path | None, **given: Any) -> "Cell | None":
    from pipeline.evaluation.questions import Cell

    if not any(value is not None for value in given.values()):
        return None
    absent = [f"--{name}" for name, value in given.items() if value is None]
    if absent:
        raise click.UsageError(f"one cell needs --variant, --seed, --policy and --metrics; {', '.join(absent)} absent")
    beta = params.train.variant(given["variant"]).reward_beta
    cell = Cell(given["variant"], given["seed"], beta, given["policy"], given["metrics"])
    return cell._replace(answers=answers / cell.name) if answers else cell


def _all_cells(params: "Params", policies: Path | None, out: Path | None, answers: Path | None) -> list["Cell"]:
    from pipeline.evaluation.questions import Cell

    if policies is None or out is None:
        raise click.UsageError(
            "all cells need --policies and --out; one cell --variant, --seed, --policy and --metrics"
        )
    cells = []
    for variant in params.sweep.variants:
        for seed in params.sweep.seeds:
            name, beta = f"{variant}-{seed}", params.train.variant(variant).reward_beta
            of_cell = answers / name if answers else None
            cells.append(Cell(variant, seed, beta, policies / name, out / f"{name}.json", of_cell))
    return cells


def _remove_others(out: Path | None, answers: Path | None, cells: list["Cell"]) -> None:
    """Files of cells that are no longer in the sweep; `out` and `answers` are kept between runs."""
    import shutil

    names = {cell.name for cell in cells} | {"reference"}
    for folder in filter(None, (out, answers)):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_file() and path.suffix == ".json" and path.stem not in names:
                path.unlink()
            elif path.is_dir() and path.name not in names and any(path.glob("*.parquet")):
                shutil.rmtree(path)


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
