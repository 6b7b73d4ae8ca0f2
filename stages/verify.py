"""`refcache verify`: read every byte of a reference cache and say what is wrong with it; on request, mend it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.options import LocalPath, default_path_option, params_file_options

if TYPE_CHECKING:
    from cache.manifest import Shard
    from pipeline.params import Params
    from pipeline.upkeep.repair import Repair

SHOWN_ROWS = 20  # flagged rows that are listed; pipeline.upkeep.drift_check returns more


@click.command(name="verify")
@click.argument("path", type=LocalPath())
@click.option("--repair", is_flag=True, help="Move what is damaged to .refcache/damaged; compute only its rows again.")
@click.option("--drift", is_flag=True, help="Compare with transformers' own forward; with --repair, rescore by it.")
@click.option("--sample", type=click.IntRange(min=1), help="Responses that --drift forwards.  [default: all]")
@default_path_option("--pairs", "data/prepared/pairs", "For --repair and --drift: pairs and responses from prepare.")
@default_path_option("--model", "models/reference", "For --repair and --drift: the reference.")
@click.option(
    "--metrics",
    type=click.Path(path_type=Path),
    help="For --repair: metrics, written anew.  [default: results/score/metrics.json or results/sketch/metrics.json]",
)
@params_file_options
def command(
    path: Path,
    repair: bool,
    drift: bool,
    sample: int | None,
    pairs: Path,
    model: Path,
    metrics: Path | None,
    params_file: Path,
    overrides: tuple[str, ...],
) -> None:
    """Check the reference cache, or the sketches, in folder PATH for damaged, missing and foreign files.

    Exits with 1 when something is wrong, after a line for each finding and its remedy. Without --repair nothing is
    changed. Damaged files are never deleted: --repair moves them, and reuses the rows of sound shards and the journal.

    \b
    Example:
      refcache verify data/reference/logps
      refcache verify data/reference/logps --repair
      refcache verify data/reference/logps --drift --sample 200
      refcache verify data/reference/sketches --repair
    """
    if not repair and not drift:
        _verify(path)
        return
    from cache.sketches import SKETCHES, stored_kind
    from pipeline.errors import RequestError
    from pipeline.params import load_params

    if path.name == "suites" and repair:
        raise RequestError(
            f"{path} holds the suites' rows, and --repair would publish those of {pairs} in their place. They are in "
            "the journal: `dvc repro -f score` publishes them again and scores what is lost. Nothing was changed."
        )
    params = load_params(params_file, overrides)
    if stored_kind(path) == SKETCHES:
        _repair_sketches(path, drift=drift, pairs=pairs, model=model, metrics=metrics, params=params)
        return
    options: dict[str, Any] = {
        "pairs": pairs,
        "model": model,
        "trainer_dtype": params.train.dtype,
        "trust_remote_code": params.model.trust_remote_code,
    }
    if repair:
        metrics = metrics or Path("results/score/metrics.json")
        _repair(path, metrics=metrics, params=params.score, drift_tolerance=params.train.drift_tolerance, **options)
    else:
        _verify(path)
    if drift:
        _check_drift(path, sample=sample, tolerance=params.train.drift_tolerance, rescore=repair, **options)


def _verify(path: Path) -> None:
    from cache import CacheCorrupt, verify

    findings = verify(path, on_sound=_report)
    for finding in findings:
        click.echo(f"{finding.file}: {finding.problem}\n  {finding.remedy}")
    if findings:
        raise CacheCorrupt(f"{path}: {_count(len(findings), 'finding')}, listed above.")
    click.echo(f"{path}: sound")


def _report(shard: "Shard") -> None:
    tokens = f"{shard.tokens} tokens, " if shard.tokens else ""  # sketches have none
    click.echo(f"{shard.file}: sound, {shard.rows} rows, {tokens}{shard.bytes} bytes")


def _repair(path: Path, **options: Any) -> None:
    from pipeline.upkeep.repair import repair_reference

    _show_repair(path, repair_reference(path, **options), "scored")


def _repair_sketches(path: Path, *, drift: bool, params: "Params", metrics: Path | None, **options: Any) -> None:
    from pipeline.errors import RequestError
    from pipeline.upkeep.repair import repair_sketches

    if drift:
        raise RequestError(f"{path} holds sketches; --drift compares log-probs. Run it without --drift.")
    done = repair_sketches(
        path,
        metrics=metrics or Path("results/sketch/metrics.json"),
        params=params.sketch,
        trainable=params.trainable,
        score=params.score,
        trust_remote_code=params.model.trust_remote_code,
        **options,
    )
    _show_repair(path, done, "sketched")


def _show_repair(path: Path, done: "Repair", computed: str) -> None:
    for finding in done.findings:
        click.echo(f"{finding.file}: {finding.problem}")
    if done.summary is not None:
        again, reused = done.summary[f"rows_{computed}"], done.summary["rows_reused"]
        click.echo(f"moved {_count(len(done.moved), 'file')} to {done.aside}; nothing was deleted")
        click.echo(f"{again:,} rows {computed} again, {reused:,} reused")
    click.echo(f"{path}: sound")


def _check_drift(path: Path, *, tolerance: float, rescore: bool, **options: Any) -> None:
    from pipeline.upkeep.drift_check import check_reference_drift

    found = check_reference_drift(path, tolerance=tolerance, rescore=rescore, **options)
    spread = found["per_sequence"]
    click.echo(
        f"drift over {found['responses']:,} responses: {spread['max']:.3g} nats a sequence at most, p99 "
        f"{spread['p99']:.3g} (typical margin {found['typical_margin']:.3g})"
    )
    for row in found["flagged"][:SHOWN_ROWS]:
        where = f" ({', '.join(row['sources'])})" if row["sources"] else ""
        click.echo(f"  {row['response_key']}: {row['drift']:.3g} nats over {row['n_tokens']} tokens{where}")
    above = f"{_count(found['flagged_rows'], 'row')} above {tolerance:g} nats"
    if found["rescored"] is not None:
        done = found["rescored"]
        click.echo(
            f"{above}; {done['rows']:,} scored anew with transformers in float32, {done['kept']:,} were before, "
            f"{done['still_flagged']:,} stay above, which is the trainer's own rounding"
        )
    elif found["flagged_rows"]:
        from pipeline.errors import RunFailed

        raise RunFailed(
            f"{path}: {above} (train.drift_tolerance). Run `refcache verify {path} --drift --repair` to score them "
            "anew with transformers in float32, or score in float32."
        )
    else:
        click.echo(above)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
