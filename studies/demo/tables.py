"""The tables of the demo study's page."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl
from pydantic import TypeAdapter

from pipeline.evaluation.metrics import mean_over_prompts
from pipeline.params import Params, Trainable
from studies.demo.claims import AUX, DPO
from studies.demo.results import METRICS, OF_ANSWERS, PolicyClass, Results, parse_trainable
from studies.pages.markdown import markdown_table
from studies.pages.runs import REFERENCE, Cells, read_json

HEADINGS = [f"{metric.title} ({metric.unit})" for metric in METRICS.values()]
KEPT = ("null_ratio", "penalty", "penalty_audit")  # of train.json's offsets
EVALUATED = ("all", DPO, 0)  # class, variant and seed of the cell that the `evaluate` stage of dvc.yaml measures


def classes_table(classes: Sequence[PolicyClass], run: Path) -> str:
    rows = []
    for each in classes:
        numbers = read_json(run / "sketch" / f"{each.name}.json")["numbers_per_row"]
        kind = "the gradient itself" if each.sketch == "exact" else f"{each.k:,} a block"
        trained = trained_parameters(run / "reference", each)
        rows.append(
            (
                each.title,
                f"{trained:,}",
                f"{each.learning_rate:g}",
                f"{each.null_weight_absolute:g}",
                f"{numbers:,} ({kind})",
            )
        )
    return markdown_table(
        ["what trains", "parameters", "learning rate", "null_weight_absolute", "numbers a response, with audit"], rows
    )


def trained_parameters(reference: Path, of: PolicyClass) -> int:
    """How many numbers train in this class."""
    from pipeline.trainable.selection import select_trainable
    from studies.measure.policies import load_model

    chosen = TypeAdapter[Trainable](Trainable).validate_python(parse_trainable(of.trainable))
    model = select_trainable(load_model(reference), chosen)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def cells_table(params: Params, classes: Sequence[PolicyClass], results: Results) -> str:
    level = results.estimate(classes[0].name, REFERENCE, "reward").show(METRICS["reward"].digits)
    rows = [["–", REFERENCE, *(level if metric in ("reward", "value") else "–" for metric in METRICS)]]
    for each in classes:
        for name in params.sweep.variants:
            figures = (results.estimate(each.name, name, metric).show(of.digits) for metric, of in METRICS.items())
            rows.append([each.title, name, *figures])
    return markdown_table(["what trains", "objective", *HEADINGS], rows)


def differences_table(params: Params, classes: Sequence[PolicyClass], results: Results) -> str:
    rows = []
    for name in reversed([name for name in params.sweep.variants if name != DPO]):
        for each in classes:
            found = {metric: results.difference(each.name, name, DPO, metric) for metric in METRICS}
            shown = (difference.show(METRICS[metric].digits) for metric, difference in found.items())
            rows.append([each.title, f"{name} − {DPO}", *shown])
    return markdown_table(["what trains", "difference", *HEADINGS], rows)


def null_table(classes: Sequence[PolicyClass], results: Results) -> str:
    rows = []
    for metric in ("reward", "value", "accuracy"):
        digits = METRICS[metric].digits
        for each in classes:
            found = results.difference(each.name, AUX, DPO, metric)
            moved = results.difference(each.name, DPO, REFERENCE, metric).show(digits) if metric in OF_ANSWERS else "–"
            rows.append((METRICS[metric].title, each.title, found.show(digits), f"{found.half:.{digits}f}", moved))
    return markdown_table(["figure", "what trains", f"{AUX} − {DPO}", "missed", f"{DPO} − {REFERENCE}"], rows)


def offsets_table(params: Params, classes: Sequence[PolicyClass], run: Path) -> str:
    rows = []
    for each in classes:
        cells = [run / "cells" / each.name / f"{AUX}-{seed}" for seed in params.sweep.seeds]
        rms, share, ratio, penalty, audit = mean_offsets(cells)
        rows.append((each.title, f"{rms:.3f}", f"{share:.1%}", f"{ratio:.3f}", f"{penalty:.3g}", f"{audit:.3g}"))
    columns = ["what trains", "rms of offsets", "share of margins", "null ratio", "penalty, sketch", "penalty, audit"]
    return markdown_table(columns, rows)


def mean_offsets(cells: Sequence[Path]) -> list[float]:
    """rms, share of margins in the last epoch, null_ratio, penalty and audit penalty: means over these cells."""
    found = []
    for cell in cells:
        offsets = read_json(cell / "train.json")["offsets"]
        history = pl.read_csv(cell / "history.tsv", separator="\t")
        last = history.filter(pl.col("epoch") > pl.col("epoch").max() - 1)["offsets/share"].to_list()
        found.append((offsets["rms"], sum(last) / len(last), *(offsets[name] for name in KEPT)))
    return [sum(values) / len(found) for values in zip(*found, strict=True)]


def agreement_table(run: Path, results: Results) -> str:
    """One cell by the pipeline's `evaluate`, with vLLM, and by this study; standard errors are over prompts."""
    theirs = read_json(run / "evaluate.json")
    reward = theirs["expected_reward"]
    rows = [
        ("expected reward", *_pair(reward["policy"], reward["policy_standard_error"], of_cell(results, "reward"))),
        (
            "expected reward of the reference",
            *_pair(reward["reference"], reward["reference_standard_error"], of_cell(results, "reward", REFERENCE)),
        ),
        ("KL, nats an answer", *_pair(theirs["kl"], theirs["kl_standard_error"], of_cell(results, "kl"))),
        ("reward accuracy", f"{theirs['rewards/accuracies']:.3f}", f"{of_cell(results, 'accuracy')[0]:.3f}"),
    ]
    return markdown_table(["", "`evaluate`", "this study"], rows)


def _pair(mean: float, error: float, own: tuple[float, float | None]) -> tuple[str, str]:
    return f"{mean:.3f} ({error:.3f})", f"{own[0]:.3f} ({own[1] or 0:.3f})"


def of_cell(results: Results, metric: str, variant: str | None = None) -> tuple[float, float | None]:
    """Mean and standard error over prompts, as `evaluate` takes them, of the cell that it measured."""
    name, evaluated, seed = EVALUATED
    tables = results.answers if metric in OF_ANSWERS else results.pairs
    values = tables[name].values.filter(pl.col("seed") == seed)
    return mean_over_prompts(Cells(values, "test").by_pair(variant or evaluated, metric)[0][:, None])
