"""The demo study's claims, tables and figure on made-up runs, whose answers are known."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from pipeline.params import load_params
from studies.demo import page as demo_page
from studies.demo.claims import judge
from studies.demo.results import DemoStudy, Estimate, Results, load_results
from studies.demo.tables import mean_offsets, of_cell, trained_parameters
from studies.pages.intervals import Mean
from studies.pages.settings import load_section
from tests import ROOT
from tests.tiny import write_model

FOLDER = ROOT / "studies" / "demo"
PARAMS = load_params(FOLDER / "params.yaml")
CLASSES = load_section(FOLDER / "classes.yaml", "demo", DemoStudy).classes
SEEDS = PARAMS.sweep.seeds
PROMPTS = 40  # of two pairs each
# Of every objective in the made-up run: by how many nats chosen and rejected move, expected reward, KL.
AS_EXPECTED = {
    "reference": (0.0, 0.0, 1.0, 0.0),
    "dpo": (-5.0, -4.0, 1.2, 3.0),
    "bdpo": (2.0, -1.0, 1.3, 1.0),
    "bpo": (1.0, -3.0, 1.3, 2.0),
    "auxdpo": (-5.0, -9.0, 1.5, 3.0),
}


def write_measured(run: Path, moves: dict[str, dict[str, tuple[float, float, float, float]]]) -> None:
    """Both tables of every class; `moves`: by class, what differs from AS_EXPECTED. Seeds and prompts add noise."""
    for each in CLASSES:
        random = np.random.default_rng(0)
        prompt = random.normal(0, 0.5, PROMPTS)  # what all policies have in common
        pairs, answers = [], []
        for variant, figures in (AS_EXPECTED | moves.get(each.name, {})).items():
            for seed in SEEDS:
                noise = random.normal(0, 0.05, (4, PROMPTS))
                answers += answer_rows(variant, seed, figures[2:], prompt + noise[0], noise[1])
                if variant != "reference" or seed == 0:
                    moved = np.zeros((2, PROMPTS)) if variant == "reference" else noise[2:] * 20
                    pairs += pair_rows(variant, seed, figures[:2], moved)
        folder = run / "measured" / each.name
        folder.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(pairs).write_parquet(folder / "pair_logps.parquet")
        pl.DataFrame(answers).write_parquet(folder / "answers.parquet")


def answer_rows(variant: str, seed: int, figures: tuple[float, ...], reward: np.ndarray, kl: np.ndarray) -> list[dict]:
    shared = {"variant": variant, "seed": seed, "split": "test"}
    moves = 0.0 if variant == "reference" else 1.0
    return [
        shared | {"prompt_key": bytes([p]), "reward": figures[0] + reward[p], "kl": figures[1] + moves * kl[p]}
        for p in range(PROMPTS)
    ]


def pair_rows(variant: str, seed: int, moves: tuple[float, ...], noise: np.ndarray) -> list[dict]:
    shared = {"variant": variant, "seed": seed, "split": "test", "ref_chosen": -30.0, "ref_rejected": -31.0}
    return [
        shared
        | {
            "prompt_key": bytes([p]),
            "pair_id": 2 * p + place,
            "chosen_tokens": 9,
            "chosen": -30.0 + moves[0] + noise[0, p],
            "rejected": -31.0 + moves[1] + noise[1, p],
        }
        for p in range(PROMPTS)
        for place in range(2)
    ]


def results_of(run: Path, moves: dict[str, dict[str, tuple[float, float, float, float]]]) -> Results:
    write_measured(run, moves)
    return load_results(run, CLASSES, PARAMS)


def verdicts(run: Path, moves: dict[str, dict[str, tuple[float, float, float, float]]]) -> dict[str, bool]:
    return {claim.text: claim.holds for claim in judge(results_of(run, moves), CLASSES)}


# In the smallest class AuxDPO gains 0.2 more than in the others.
MISSPECIFIED = {"lora": {"auxdpo": (-5.0, -9.0, 1.7, 3.0)}}


def test_a_run_as_expected_makes_every_claim_true(tmp_path):
    found = verdicts(tmp_path, MISSPECIFIED)
    assert len(found) == 4 * len(CLASSES) + 4 and all(found.values())


@pytest.mark.parametrize(
    ("name", "changed", "fails"),
    [
        (
            "last_half",
            {"dpo": (-5.0, -4.0, 1.0, 3.0)},
            {"DPO raises the expected reward above the reference's (last 50 %)"},
        ),
        (
            "last_half",
            {"auxdpo": (-5.0, -9.0, 1.2, 2.0)},  # the same reward at a smaller KL
            {"AuxDPO's expected reward is above DPO's (last 50 %)"},
        ),
        (
            "last_half",
            {"auxdpo": (-5.0, -9.0, 1.5, 6.0)},  # more reward, paid for in KL
            {"AuxDPO's E[r] − β KL is above DPO's (last 50 %)"},
        ),
        (
            "last_half",
            {"auxdpo": (-5.0, -4.0, 1.5, 3.0)},
            {"AuxDPO's reward accuracy is above DPO's (last 50 %)"},
        ),
        (
            "last_block",
            {"bdpo": (2.0, -1.0, 1.3, 3.0)},
            {"BDPO stays nearer to the reference than DPO, whatever trains"},
        ),
        (
            "all",
            {"bdpo": (-5.0, -6.0, 1.3, 1.0)},
            {"BDPO degrades fewer chosen responses than DPO, whatever trains"},
        ),
        ("lora", {"bpo": (-5.0, -7.0, 1.3, 2.0)}, {"BPO degrades fewer chosen responses than DPO, whatever trains"}),
    ],
)
def test_each_claim_fails_by_its_own_figures(tmp_path, name, changed, fails):
    moves = MISSPECIFIED | {name: MISSPECIFIED.get(name, {}) | changed}
    assert {text for text, holds in verdicts(tmp_path, moves).items() if not holds} == fails


def test_a_gain_that_is_the_same_everywhere_is_none_of_a_small_class(tmp_path):
    false = [text for text, holds in verdicts(tmp_path, {}).items() if not holds]
    assert len(false) == 1 and false[0].startswith("AuxDPO gains more over DPO where least trains")


def test_differences_are_paired_by_seed_and_prompt(tmp_path):
    """What prompts have in common, 0.5 either way, leaves a mean uncertain and a difference not."""
    results = results_of(tmp_path, {})
    level, difference = results.estimate("all", "dpo", "reward"), results.difference("all", "auxdpo", "dpo", "reward")
    assert level.prompts.half > 0.1 > 0.02 > difference.half
    assert difference.value == pytest.approx(0.3, abs=0.02) and difference.sign == 1
    back = results.difference("all", "dpo", "auxdpo", "reward")
    assert back.sign == -1 and back.value == pytest.approx(-difference.value)
    none = results.difference("all", "dpo", "dpo", "accuracy")
    assert none.sign == 0 and none.half == 0


@pytest.mark.parametrize(
    ("seeds", "prompts", "sign"),
    [
        (Mean(0.3, 0.1), Mean(0.3, 0.2), 1),
        (Mean(0.3, 0.4), Mean(0.3, 0.2), 0),
        (Mean(0.3, 0.1), Mean(0.3, 0.4), 0),
        (Mean(-0.3, 0.1), Mean(-0.3, 0.2), -1),
        (Mean(0.3, float("nan")), Mean(0.3, 0.2), 0),
    ],
)
def test_a_difference_counts_only_if_both_intervals_leave_out_zero(seeds, prompts, sign):
    assert Estimate(seeds, prompts).sign == sign


def test_value_is_reward_less_beta_times_kl_and_the_cells_are_those_of_the_tables(tmp_path):
    results = results_of(tmp_path, {})
    found = {metric: results.estimate("all", "bdpo", metric).value for metric in ("reward", "kl", "value")}
    assert found["value"] == pytest.approx(found["reward"] - 0.1 * found["kl"])
    table = pl.read_parquet(tmp_path / "measured" / "all" / "answers.parquet")
    own = table.filter((pl.col("variant") == "dpo") & (pl.col("seed") == 0))["reward"]
    error = own.std() / PROMPTS**0.5
    assert of_cell(results, "reward") == pytest.approx((own.mean(), error))


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All that the page reads."""
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "reference")
    summary = {"pairs": {"train": 774, "test": 2 * PROMPTS}, "prompts": {"train": 320, "test": PROMPTS}}
    write_json(folder / "prepared" / "summary.json", summary | {"truncated_responses": 0, "distinct_responses": 1205})
    for stage in ("sft", "score"):
        write_json(folder / stage / "metrics.json", {"seconds": 12.0})
    for each in CLASSES:
        write_json(folder / "sketch" / f"{each.name}.json", {"seconds": 2.5, "numbers_per_row": 4096})
        for name in PARAMS.sweep.variants:
            for seed in SEEDS:
                offsets = {"rms": 0.1 * (1 + seed), "null_ratio": 0.2, "penalty": 0.01, "penalty_audit": 0.02}
                write_json(
                    folder / "cells" / each.name / f"{name}-{seed}" / "train.json",
                    {"seconds": 20.0} | {"offsets": offsets},
                )
        for seed in SEEDS:
            lines = [f"{step}\t{step / 10}\t{0.5 if step > 20 else 0.0}" for step in range(1, 31)]
            history = folder / "cells" / each.name / f"auxdpo-{seed}" / "history.tsv"
            history.write_text("\n".join(["step\tepoch\toffsets/share", *lines]) + "\n")
    reward = {"policy": 1.21, "policy_standard_error": 0.07, "reference": 1.01, "reference_standard_error": 0.06}
    theirs = {"expected_reward": reward, "kl": 3.01, "kl_standard_error": 0.2, "rewards/accuracies": 0.5}
    write_json(folder / "evaluate.json", theirs)
    write_measured(folder, MISSPECIFIED)
    return folder


def test_page_states_claims_cells_differences_and_what_null_means(run, tmp_path):
    words = ["--params", FOLDER / "params.yaml", "--classes", FOLDER / "classes.yaml", "--run", run]
    words += ["--page", tmp_path / "demo.md", "--figure", tmp_path / "demo.svg"]
    result = CliRunner().invoke(demo_page.command, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0 and result.output.count("true ") == 20
    page = (tmp_path / "demo.md").read_text()
    assert page.count("| true |") == 20 and "**false**" not in page and "{" not in page
    for each in CLASSES:
        rows = [line for line in page.splitlines() if line.startswith(f"| {each.title} |")]
        assert len(rows) == 1 + 4 + 3 + 1  # of the tables of classes, cells, differences and offsets
    assert "80 policies from one scoring pass" in page and "over the 40 held-out prompts" in page
    assert "| 50.0% |" in page and "1.210 (0.070)" in page
    assert (tmp_path / "demo.svg").read_text().startswith("<svg")


def test_offsets_are_means_over_seeds_and_their_share_that_of_the_last_epoch(run):
    cells = [run / "cells" / "lora" / f"auxdpo-{seed}" for seed in SEEDS]
    assert mean_offsets(cells) == pytest.approx([0.3, 0.5, 0.2, 0.01, 0.02])


def test_trained_parameters_are_those_of_the_class(run):
    """A tiny Qwen2's last block, of two, and the B and A of its adapter (32 wide)."""
    found = {each.name: trained_parameters(run / "reference", each) for each in CLASSES}
    attention, mlp = 4 * 32 * 32 + 3 * 32, 3 * 32 * 64
    assert found["last_block"] == found["last_half"] == attention + mlp + 2 * 32
    assert found["lora"] == 4 * (32 + 32) * 4
    assert found["all"] == 2 * found["last_block"] + 64 * 32 + 32
