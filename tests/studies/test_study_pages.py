"""The pages' claims and figures on made-up runs, whose answers are known."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from pipeline.params import load_params
from studies.dynamics import page as dynamics_page
from studies.dynamics.claims import Divergences
from studies.dynamics.claims import judge as judge_dynamics
from studies.pages.runs import Cells, sweep_totals, with_rewards
from studies.sweeps import page as sweeps_page
from studies.sweeps.claims import difference, settings
from studies.sweeps.claims import judge as judge_sweep
from tests import ROOT
from tests.tiny import write_model

PAIRS = 30
# Nats by which each objective moves chosen and rejected, and its divergence, in the made-up run: as the papers say.
AS_CLAIMED = {
    "dpo": (-5.0, -20.0, 9.0),
    "dpop": (2.0, -3.0, 1.0),
    "dpo_nll": (8.0, -4.0, 7.0),
    "bdpo": (3.0, -2.0, 2.0),
    "bpo": (4.0, -4.0, 3.0),
}


def study_params(study: str):
    return load_params(ROOT / "studies" / study / "params.yaml")


def pair_table(moves: dict[str, tuple[float, float]], seeds: list[int], split: str = "test") -> pl.DataFrame:
    """pair_logps.parquet of PAIRS pairs, one prompt each; every policy moves its pairs as told, with a little noise."""
    random = np.random.default_rng(0)
    start = random.uniform(-60, -40, (2, PAIRS))
    rows = []
    for variant, (chosen, rejected) in {"reference": (0.0, 0.0), **moves}.items():
        for seed in [0] if variant == "reference" else seeds:
            noise = random.normal(0, 0.0 if variant == "reference" else 0.5, (2, PAIRS))
            for pair in range(PAIRS):
                rows.append(
                    {
                        "split": split,
                        "prompt_key": bytes([pair]),
                        "pair_id": pair,
                        "ref_chosen": start[0, pair],
                        "ref_rejected": start[1, pair],
                        "chosen_tokens": 20,
                        "variant": variant,
                        "seed": seed,
                        "chosen": start[0, pair] + chosen + noise[0, pair],
                        "rejected": start[1, pair] + rejected + noise[1, pair],
                    }
                )
    return pl.DataFrame(rows)


def kl_table(divergence: dict[str, float], seeds: list[int], split: str = "test") -> pl.DataFrame:
    random = np.random.default_rng(1)
    return pl.DataFrame(
        [
            {"variant": name, "seed": seed, "split": split, "prompt_key": bytes([p]), "kl": kl + random.normal(0, 0.3)}
            for name, kl in divergence.items()
            for seed in seeds
            for p in range(PAIRS)
        ]
    )


def dynamics_verdicts(changed: dict[str, tuple[float, float, float]]) -> dict[str, bool]:
    """Claim by its first words, with some objectives' numbers changed from those of the papers."""
    params, numbers = study_params("dynamics"), AS_CLAIMED | changed
    table = pair_table({name: row[:2] for name, row in numbers.items()}, params.sweep.seeds)
    kl = kl_table({name: row[2] for name, row in numbers.items()}, params.sweep.seeds)
    claims = judge_dynamics(Cells(with_rewards(table, params), "test"), Divergences(kl, "test"), "test")
    return {claim.text.partition(" (")[0]: claim.holds for claim in claims}


def test_a_run_as_the_papers_say_makes_every_claim_true():
    verdicts = dynamics_verdicts({})
    assert len(verdicts) == 7 and all(verdicts.values())


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({"dpo": (0.0, -20.0, 9.0)}, {"DPO lowers both chosen and rejected"}),  # no change is not a fall
        ({"dpo": (-5.0, 0.5, 9.0)}, {"DPO lowers both chosen and rejected"}),
        ({"bdpo": (-1.0, -2.0, 2.0)}, {"BDPO lowers the NLL of chosen responses without an NLL term"}),
        ({"dpop": (2.0, -3.0, 7.0)}, {"dpop stays nearer to the reference than dpo_nll"}),  # as near
        (
            {"bdpo": (3.0, -2.0, 10.0)},
            {f"bdpo stays nearer to the reference than {far}" for far in ("dpo", "dpo_nll")},
        ),
        (
            {"bpo": (-4.0, -4.0, 3.0)},
            {"BPO raises the chosen log-prob, and fewer chosen responses fall than under DPO"},
        ),
    ],
)
def test_each_claim_fails_by_its_own_figures(changed, fails):
    assert {text for text, holds in dynamics_verdicts(changed).items() if not holds} == fails


def sweep_cells(moves: dict[str, tuple[float, float]]) -> Cells:
    params = study_params("sweeps")
    return Cells(with_rewards(pair_table(moves, params.sweep.seeds), params), "test")


def test_sweep_metrics_of_a_policy_are_those_of_its_pairs():
    cells = sweep_cells({"bdpo_0_1": (10.0, -30.0)})
    assert cells.over_seeds("bdpo_0_1", "margin").value == pytest.approx(0.1 * 40, abs=0.05)
    assert cells.over_seeds("bdpo_0_1", "accuracy") == (1.0, 0.0)
    assert cells.over_prompts("bdpo_0_1", "dcr") == (0.0, 0.0)
    assert difference(cells, "bdpo_0_1", "bdpo_0_1", "margin") == (0.0, 0.0)


def test_sweep_expectations_are_judged_by_their_figures():
    params = study_params("sweeps")
    sweep = settings(params)
    # dcr rises with the mixture; BPO's chosen responses rise; its rejected ones fall 1/alpha as far.
    moves = {s.variant: (1 - 2 * s.value if s.series == "bdpo" else 2.0, -2 / s.value) for s in sweep}
    assert [claim.holds for claim in judge_sweep(sweep_cells(moves), sweep)] == [True] * 5
    moves |= {"bdpo_0_999": (3.0, -2.0), "bpo_hinge_1_0": (-9.0, -40.0)}
    assert [claim.holds for claim in judge_sweep(sweep_cells(moves), sweep)] == [False, True, False, False, True]


def test_cost_scores_once_or_once_a_cell():
    seconds = {
        name: {"wall": wall, "cpu": 2 * wall} for name, wall in (("train", 10.0), ("score", 7.0), ("online", 1.0))
    }
    assert sweep_totals(seconds, 48) == {
        "cached": {"wall": 487.0, "cpu": 974.0},
        "anew": {"wall": 816.0, "cpu": 1632.0},
        "online": {"wall": 528.0, "cpu": 1056.0},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What both pages read beside their own tables."""
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "reference")
    summary = {"pairs": {"train": 300, "test": PAIRS}, "prompts": {"train": 300, "test": PAIRS}}
    summary |= {"truncated_responses": 10, "distinct_responses": 700}
    write_json(folder / "prepared" / "summary.json", summary)
    for stage in ("sft", "score"):
        write_json(folder / stage / "metrics.json", {"seconds": 12.0})
    for study in ("dynamics", "sweeps"):
        params = study_params(study)
        for name in params.sweep.variants:
            for seed in params.sweep.seeds:
                cell = folder / "cells" / f"{name}-{seed}"
                write_json(cell / "train.json", {"seconds": 30.0})
                metrics = ["rewards/chosen", "rewards/rejected", "in_distribution_logp", "nll/chosen", "dcr"]
                lines = ["\t".join(["step", "epoch", *metrics, "rewards/accuracies"])]
                lines += [
                    "\t".join(map(str, [step, step / 20, 0.1 * step, -0.2 * step, -40, 2, 0.5, 0.6]))
                    for step in range(1, 121)
                ]
                (cell / "history.tsv").write_text("\n".join(lines) + "\n")
    cost = {name: {"wall": 10.0, "cpu": 15.0} for name in ("train", "online")} | {"cell": "bdpo_0_1-0"}
    write_json(folder / "cost.json", cost | {"score": {"wall": 20.0, "cpu": 30.0, "rows": 700}})
    return folder


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_page(module, study: str, run: Path, out: Path) -> str:
    words = ["--run", run, "--page", out / "page.md", "--figure", out / "page.svg"]
    words += ["--params", ROOT / "studies" / study / "params.yaml"]
    result = CliRunner().invoke(module.command, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0
    assert (out / "page.svg").read_text().startswith("<svg")
    return (out / "page.md").read_text()


def test_dynamics_page_states_claims_sizes_and_figures(run, tmp_path):
    params = study_params("dynamics")
    moves = {name: row[:2] for name, row in AS_CLAIMED.items()}
    tables = [pair_table(moves, params.sweep.seeds, split) for split in ("train", "test")]
    pl.concat(tables).write_parquet(run / "pair_logps.parquet")
    kl = [
        kl_table({name: row[2] for name, row in AS_CLAIMED.items()}, params.sweep.seeds, s) for s in ("train", "test")
    ]
    pl.concat(kl).write_parquet(run / "divergence.parquet")
    page = write_page(dynamics_page, "dynamics", run, tmp_path)
    assert page.count("| true |") == 14 and "**false**" not in page
    assert "300 training pairs" in page and "epochs" in page


def test_sweeps_page_has_a_row_a_variant_and_the_cost(run, tmp_path):
    params = study_params("sweeps")
    table = pair_table({name: (1.0, -2.0) for name in params.sweep.variants}, params.sweep.seeds)
    table.write_parquet(run / "pair_logps.parquet")
    page = write_page(sweeps_page, "sweeps", run, tmp_path)
    assert sum(line.startswith(("| BDPO, mixture", "| BPO, alpha")) for line in page.splitlines() if "±" in line) >= 16
    assert "| 500 | 750 | 1.00 × |" in page and "| 1,440 | 2,160 | 2.88 × |" in page


def test_curves_are_means_over_an_epoch_and_over_seeds(tmp_path):
    files = []
    for seed in range(2):
        steps = pl.DataFrame({"step": range(1, 41)})
        columns = {name: 0.0 for name in dynamics_page.PANELS if name not in ("chosen", "rejected")}
        table = steps.with_columns(
            (pl.col("step") / 10).alias("epoch"),
            (0.1 * (pl.col("step") % 2) * (1 + seed)).alias("rewards/chosen"),
            pl.lit(0.0).alias("rewards/rejected"),
            *(pl.lit(value).alias(name) for name, value in columns.items()),
        )
        files.append(tmp_path / f"{seed}.tsv")
        table.write_csv(files[-1], separator="\t")
    rows = [row for row in dynamics_page.curve_points(files, "dpo", beta=0.1) if row["metric"] == "chosen"]
    # Every other step is 1 or 2 nats by seed, so an epoch's mean is half of 1.5.
    assert [row["value"] for row in rows[10:]] == pytest.approx([0.75] * len(rows[10:]))
