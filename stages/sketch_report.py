"""`refcache sketch-report`: is the published sketch large enough for what is to be constrained by it?"""

from pathlib import Path
from typing import Any

import click

from stages.options import LocalPath, default_path_option, trust_option
from stages.tables import Table, echo_tables, show


@click.command(name="sketch-report")
@click.argument("path", type=LocalPath())
@click.option(
    "--null-weight",
    "null_weights",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    help="Weight of AuxDPO's constraint in m / (4 mean ||g||^2); repeatable. Suggestions are for the largest.  "
    "[default: 20, if no other is named]",
)
@click.option(
    "--null-weight-absolute",
    "absolute",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    help="The same as the factor itself; repeatable.",
)
@click.option(
    "--ridge", type=click.FloatRange(min=0), default=0.0, show_default=True, help="AuxDPO's ridge on the offsets."
)
@click.option("--rows", default=2048, show_default=True, help="Rows of the spectrum, at most 8,192; more are sampled.")
@click.option("--seed", default=0, show_default=True, help="Of that sample.")
@click.option("--offsets", type=click.Path(path_type=Path), help="A policy's offsets.parquet, to be measured as well.")
@click.option(
    "--trained",
    type=click.Path(path_type=Path),
    help="With --offsets: train.json of that run.  [default: results/NAME/train.json, NAME the policy's folder]",
)
@default_path_option("--pairs", "data/prepared/pairs", "With --offsets: the pairs of that run.")
@default_path_option("--model", "models/reference", "With --exact: the reference.")
@click.option(
    "--exact", is_flag=True, help="With --offsets: the true penalty too, by one epoch of reference gradients."
)
@trust_option
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write as well.")
def command(
    path: Path,
    null_weights: tuple[float, ...],
    absolute: tuple[float, ...],
    ridge: float,
    rows: int,
    seed: int,
    offsets: Path | None,
    trained: Path | None,
    pairs: Path,
    model: Path,
    exact: bool,
    trust_remote_code: bool,
    out: Path | None,
) -> None:
    """Report on the sketches in folder PATH: spectrum, effective dimension, errors, and how large they should be.

    Measured errors compare with what is exact or independent: the norms stored with each row, and the audit sketch.
    Memory is 32 bytes times the square of --rows, and 128 MiB (exact gradients: up to 1 GB).

    With --offsets also how far AuxDPO's trained offsets are from the null space: ||sum_j w_j delta_j g_j||^2, weighted
    and centred as in training, by the sketch, by the audit and, with --exact, without any sketch.

    \b
    Example:
      refcache sketch-report data/reference/sketches
      refcache sketch-report data/reference/sketches --null-weight 1 --null-weight 20 --out results/sketch/report.json
      refcache sketch-report data/reference/sketches --offsets models/policies/auxdpo-0/offsets.parquet --exact
    """
    if exact and offsets is None:
        raise click.UsageError("--exact measures trained offsets; name their file with --offsets.")
    from pipeline.files import write_json
    from pipeline.params import AuxDPO
    from pipeline.upkeep.sketch_report import report_sketches

    if not null_weights and not absolute:
        null_weights = (AuxDPO(objective="auxdpo").null_weight or 0.0,)
    found = report_sketches(path, null_weights=null_weights, absolute=absolute, ridge=ridge, rows=rows, seed=seed)
    if offsets is not None:
        from pipeline.upkeep.offset_report import report_offsets  # torch, which the rest does without

        trained = trained or Path("results") / offsets.parent.name / "train.json"
        measured = report_offsets(
            path,
            offsets,
            trained=trained,
            pairs=pairs,
            model=model if exact else None,
            trust_remote_code=trust_remote_code,
        )
        found["warnings"] += measured.pop("warnings")
        found["offsets"] = measured
    if out is not None:
        write_json(out, found)
    echo_tables(list(_tables(found)))
    suggested = found["suggested"]
    click.echo(
        f"Suggested for null_weight {found['penalties'][-1]['null_weight']:.4g} "
        f"({found['penalties'][-1]['null_weight_absolute']:.4g} absolute): sketch.k {suggested['k']:,} a group; a "
        f"projection of rank {suggested['rank']:,}."
    )
    for warning in found["warnings"]:
        click.echo(f"Warning: {warning}")


def _tables(found: dict[str, Any]) -> list[Table]:
    sampled = "all" if found["seed"] is None else f"{found['rows_used']:,} of them, seed {found['seed']}"
    facts = {
        **{name: found[name] for name in ("path", "reference_id", "mode", "source", "trainable", "rows")},
        "rows used": sampled,
        "numbers a row": found["numbers"],
        "effective numbers": found["effective_numbers"] or "exact gradients",
        "mean squared norm": found["spectrum"]["energy"],
        "stable rank": found["spectrum"]["stable_rank"],
        "leading shares of the energy": "  ".join(show(share) for share in found["spectrum"]["leading"]),
    }
    names = {
        "null_weight": "null_weight",
        "null_weight_absolute": "absolute",
        "mu": "mu",
        "dimension_of_sketch": "of the sketch",
        "dimension": "effective dimension",
        "predicted_ratio": "seen of a fitted penalty, predicted",
        "measured_ratio": "measured by the audit",
    }
    groups = [[name, show(g["numbers"]), show(g["energy"])] for name, g in found["groups"].items()]
    errors = [[name, *map(show, error.values())] for name, error in found["errors"].items()]
    penalties = [[_dimension(p[name]) for name in names] for p in found["penalties"]]
    tail = [[show(value) for value in row.values()] for row in found["spectrum"]["tail"]]
    tables = [
        ("Sketches", ["field", "value"], [[name, show(value)] for name, value in facts.items()]),
        ("Groups of parameters", ["group", "numbers", "share of the energy"], groups),
        ("Energy outside the leading directions", ["directions", "by the sketch", "by the audit"], tail),
        ("Relative errors of squared norms, row by row", ["", "predicted", "measured", "mean", "worst"], errors),
        ("Offsets fitted to the sketch", list(names.values()), penalties),
    ]
    if "offsets" in found:
        tables.append(
            ("Trained offsets", ["field", "value"], [[_OFFSETS[name], show(v)] for name, v in _measured(found)])
        )
    return [table for table in tables if table[2]]


_OFFSETS = {
    "path": "path",
    "responses": "responses",
    "constraint": "constraint in training",
    "null_weight": "null_weight",
    "null_weight_absolute": "null_weight_absolute",
    "weights": "weights",
    "centred": "centred",
    "rms": "rms",
    "penalty": "penalty by the sketch",
    "penalty_audit": "by the audit",
    "penalty_exact": "in truth",
    "null_ratio": "null_ratio",
}


def _measured(found: dict[str, Any]) -> list[tuple[str, Any]]:
    measured = found["offsets"]
    return [(name, measured[name]) for name in _OFFSETS if measured[name] is not None]


def _dimension(value: float | None) -> str:
    return "too large to tell" if value is None else show(value)
