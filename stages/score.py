"""The `score` stage."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    from pipeline.params import Params


@click.command("score")
@path_option("--pairs", "Prepared pairs and responses (from prepare).")
@path_option("--model", "The reference: a transformers folder (from sft).")
@path_option("--out", "Reference cache to write.")
@path_option("--metrics", "JSON file for rows, tokens/s and drift.")
@click.option("--suites", type=click.Path(path_type=Path), help="Prepared suites (from suites); with --suites-out.")
@click.option("--suites-out", type=click.Path(path_type=Path), help="Reference cache to write for these.")
@params_options
def command(
    params: "Params", pairs: Path, model: Path, out: Path, metrics: Path, suites: Path | None, suites_out: Path | None
) -> None:
    """Score every response under the reference model with vLLM.

    Only responses that were not scored before are scored; a killed run goes on where it was. Responses that can't be
    scored are named with their line of the input, all others are scored, and nothing is published. The log-probs are
    written as Parquet with the reference's identity, and a sample is compared with the trainer's own forward (drift).
    With sketch.source engine, the same pass sketches the output head's gradient for the sketch stage. Responses of
    suites are scored in the same run and published apart, so that a new suite changes nothing that policies train with.

    \b
    Example:
      refcache score --pairs data/prepared/pairs --model models/reference \\
        --out data/reference/logps --metrics results/score/metrics.json \\
        --suites data/prepared/suites --suites-out data/reference/suites
    """
    if (suites is None) != (suites_out is None):
        raise click.UsageError("--suites (prepared suites) and --suites-out (their reference cache) go together")
    from pipeline.reference.scoring import score_responses

    summary = score_responses(
        pairs=pairs,
        model=model,
        out=out,
        metrics=metrics,
        params=params.score,
        trainer_dtype=params.train.dtype,
        drift_tolerance=params.train.drift_tolerance,
        trust_remote_code=params.model.trust_remote_code,
        sketch=params.sketch,
        suites=suites,
        suites_out=suites_out,
    )
    click.echo(_line(summary))


def _line(summary: dict[str, Any]) -> str:
    speed = f" at {summary['tokens_per_second']:,.0f} tokens/s" if summary["rows_scored"] else ""
    again = f", {summary['rows_rescored']:,} of them twice" if summary["rows_rescored"] else ""
    sketched = f", {summary['rows_sketched']:,} sketched" if summary["rows_sketched"] else ""
    restarts = f", {summary['engine_restarts']} engines replaced" if summary["engine_restarts"] else ""
    drift = summary["drift"]["per_sequence"]
    return (
        f"score: {summary['rows_scored']:,} rows scored{speed}{again}{sketched}, {summary['rows_reused']:,} reused"
        f"{restarts}; drift {drift['max']:.2g} nats a sequence at most "
        f"(typical margin {summary['drift']['typical_margin']:.3g})"
    )
