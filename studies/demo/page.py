"""docs/studies/demo.md and its figure, from the run alone."""

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from pipeline.params import AnyVariant, Params
from pipeline.report.numbers import show_seconds
from stages.options import params_options, path_option
from studies.demo.claims import judge
from studies.demo.figure import spec
from studies.demo.results import DemoStudy, PolicyClass, Results, load_results
from studies.demo.tables import (
    agreement_table,
    cells_table,
    classes_table,
    differences_table,
    null_table,
    offsets_table,
)
from studies.pages.markdown import claims_table, write_page
from studies.pages.runs import REFERENCE, describe_data, describe_times, read_json
from studies.pages.settings import load_section
from studies.pages.svg import write_svg

INTRODUCTION = """
# AuxDPO beside DPO, BDPO and BPO on a known reward, by what trains

Written by `dvc repro studies/demo/dvc.yaml` from its run: {cells} policies from one scoring pass. AuxDPO (arXiv
2510.20413) promises more where the policy's class is too small for the reward, so the same objectives train four
classes of policies, from a small adapter to everything. The demo's reward is known: what a policy's answers earn is
measured. What is true or false here is so for a model and data of this size.
"""

CLASSES = """
The model has four blocks, so that its last 25 % are its last block; the last 50 % stand beside it. The reference was
scored once for all cells and sketched once for each class. A LoRA's random A is part of what its sketches are of, so
it is drawn once and all seeds share it. Learning rates are the demo's own and, as is usual, ten times that for the
LoRA. `null_weight_absolute` is 1 where everything trains. There it is 20 times m / (4 mean ||g||²), from where on a
penalty is as stiff as the loss in a direction of average gradients (docs/auxdpo.md); for the other classes it is so,
too, in round numbers. All this was set before any figure of this page was seen.
"""

EXPECTED = """
## What was expected

A claim about a difference is true if both its 95 % intervals, over seeds and over prompts, lie on the claimed side of
zero. Figures: mean ± seeds ± prompts.
"""

FIGURE = """
![Figures by what trains, and differences from DPO]({figure})

Above: 95 % intervals over seeds; grey, the reference. Below, differences from DPO at the same seed, hence of the
same batches in the same order: thick bars over seeds, thin ones over prompts.
"""

CELLS = """
## Every class and objective

Mean ± half of two 95 % intervals: over the {seeds} seeds, for these very prompts (what another batch order and other
draws of answers would change), and over the {prompts} held-out prompts, for these very policies (what other prompts
would change). r is the true reward, β = {beta:g}.
"""

DIFFERENCES = """
## Differences from DPO

At the same seed, hence of the same batches in the same order; answers are drawn with the same random numbers.
"""

NULL = """
## What a null result means

Where a claim is false because an interval holds zero, the run does not say that there is no difference: it says that
none lies beyond the ends of the intervals. `missed` is the wider half: a true difference of that size would be missed
in about half of such runs, one of 1.4 times that size in one of five. The last column is how far DPO itself moved, for
scale. Seeds change the batch order and the draws of answers and nothing else: there is no dropout, and every policy
starts at the one reference. Nothing here says what another reference, other preferences, another random A, more
training or another `null_weight` would change.
"""

OFFSETS = """
## What the offsets did

A null result would say little if the offsets had stayed at zero. Means over seeds at the end of training: their size
in units of reward, the share of the margins' size that they make up (last epoch), and the penalty over what it would
be if all gradients were orthogonal (1: no constraint, 0: null space), with the penalty by the sketch and by the audit
sketch, to which they were not fitted.
"""

MEASURED = """
## How it was measured

Accuracy and dcr: one forward of each policy in transformers (`studies/measure/pair_logps.py`) against the reference
cache, from which the reference's own forward differs by at most {drift:.2g} nats a response. Expected reward: {n}
answers of every policy to each held-out prompt, at temperature 1, of at most {tokens} tokens, and `true_reward` of
their text, as in `evaluate`; drawn in one process by transformers (`studies/measure/answers.py`), since two vLLM
engines for each policy would take longer than training it. Policies of one seed draw with the same random numbers.
KL: the exact divergence of the next token, summed along the same answers (`studies/measure/divergence.py`).

The pipeline's own `evaluate`, with vLLM and draws of its own, of one cell (everything, `dpo`, seed 0); standard errors
over prompts in brackets:
"""


@click.command()
@path_option("--classes", "YAML file of what trains.")
@path_option("--run", "Folder of the study's outputs.")
@path_option("--page", "Markdown page to write.")
@path_option("--figure", "SVG to write.")
@params_options
def command(params: Params, classes: Path, run: Path, page: Path, figure: Path) -> None:
    """Judge the expectations by the run and write the page."""
    compared = load_section(classes, "demo", DemoStudy).classes
    results = load_results(run, compared, params)
    claims = list(judge(results, compared))
    write_svg(spec(results, compared, params.sweep.variants), figure)
    write_page(
        page,
        introduction(params, compared, run),
        classes_table(compared, run),
        CLASSES,
        EXPECTED,
        claims_table(claims),
        FIGURE.format(figure=figure.name),
        sizes(params, results),
        cells_table(params, compared, results),
        DIFFERENCES,
        differences_table(params, compared, results),
        NULL,
        null_table(compared, results),
        OFFSETS,
        offsets_table(params, compared, run),
        measured(params, results),
        agreement_table(run, results),
        cost(params, compared, run),
    )
    for claim in claims:
        click.echo(f"{'true ' if claim.holds else 'false'} {claim.text}: {claim.evidence}")


def _settings(variant: AnyVariant) -> str:
    given = {name: value for name, value in variant.hyperparameters().items() if value is not None}
    return ", ".join(f"{name} {value}" for name, value in given.items())


def introduction(params: Params, classes: Sequence[PolicyClass], run: Path) -> str:
    train = params.train
    variants = [f"`{name}` ({_settings(train.variants[name])})" for name in params.sweep.variants]
    return "\n".join(
        [
            INTRODUCTION.format(cells=len(classes) * len(params.sweep.variants) * len(params.sweep.seeds)).strip(),
            "",
            *describe_data(params, read_json(run / "prepared" / "summary.json"), run / "reference"),
            f"- training: {train.epochs:g} epochs, batches of {train.batch_size} pairs, {train.schedule} schedule, "
            f"{train.dtype}; seeds {', '.join(map(str, params.sweep.seeds))}",
            f"- objectives: {'; '.join(variants)}",
        ]
    )


def sizes(params: Params, results: Results) -> str:
    prompts = next(iter(results.answers.values())).values["prompt_key"].n_unique()
    beta = params.train.variants[params.sweep.variants[0]].reward_beta
    return CELLS.format(seeds=len(params.sweep.seeds), prompts=prompts, beta=beta)


def measured(params: Params, results: Results) -> str:
    pairs = next(iter(results.pairs.values()))
    drift = [np.abs(pairs.by_pair(REFERENCE, f"{side}_ratio")[0]).max() for side in ("chosen", "rejected")]
    settings = params.evaluate
    return MEASURED.format(drift=max(drift), n=settings.samples_per_prompt, tokens=settings.max_new_tokens)


def cost(params: Params, classes: Sequence[PolicyClass], run: Path) -> str:
    names = [f"{name}-{seed}" for name in params.sweep.variants for seed in params.sweep.seeds]
    cells = [f"{each.name}/{name}" for each in classes for name in names]
    sketches = [show_seconds(read_json(run / "sketch" / f"{each.name}.json")["seconds"]) for each in classes]
    return (
        f"## Time\n\nInside the stages: {describe_times(run, cells)}; sketches {', '.join(sketches)}, once for each "
        "class. Every cell is a stage of its own, so that a study that was stopped goes on where it was. The whole "
        "study's time is in [README.md](README.md)."
    )


if __name__ == "__main__":
    command()
