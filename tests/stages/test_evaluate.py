"""`refcache evaluate`: which cells it asks for, and what it leaves of others."""

import json

import pytest
from click.testing import CliRunner

from pipeline.evaluation import cells as module
from pipeline.evaluation.cells import Evaluated
from stages.__main__ import main
from tests import ROOT

PATHS = ["--pairs", "p", "--model", "m", "--reference", "r", "--params"]
MEASURED = {"pairs": 4, "rewards/accuracies": 0.5, "rewards/margins": 0.1, "dcr": 0.2, "kl": None}


@pytest.fixture
def run(monkeypatch):
    """Runs the command; returns its result and the cells that it asked for."""

    def call(*words):
        asked = []

        def evaluate(cells, **options):
            asked.extend(cells)
            found = {cell.name: {"variant": cell.variant, "seed": cell.seed, **MEASURED} for cell in cells}
            return Evaluated(found, 1, len(cells))

        monkeypatch.setattr(module, "evaluate_cells", evaluate)
        return CliRunner().invoke(main, ["evaluate", *PATHS, str(ROOT / "params.yaml"), *words]), asked

    return call


def test_the_whole_sweep_is_asked_for_at_once(run, tmp_path):
    out, answers = tmp_path / "evaluate", tmp_path / "answers"
    options = ["--policies", "models", "--out", str(out), "--answers", str(answers), "--set", "sweep.seeds=[0, 3]"]
    result, asked = run(*options)
    assert result.exit_code == 0, result.output
    assert [(cell.name, cell.beta, cell.policy.as_posix()) for cell in asked] == [
        (name, 0.1, f"models/{name}") for name in ("dpo-0", "dpo-3", "bdpo-0", "bdpo-3")
    ]
    assert [cell.metrics for cell in asked] == [out / f"{cell.name}.json" for cell in asked]
    assert [cell.answers for cell in asked] == [answers / cell.name for cell in asked]
    assert "4 cells, 4 with something new to measure, 1 engine" in result.output


def test_files_of_cells_that_left_the_sweep_go(run, tmp_path):
    out, answers = tmp_path / "evaluate", tmp_path / "answers"
    for name in ("dpo-0", "old-0"):
        (answers / name).mkdir(parents=True)
        (answers / name / "samples.parquet").write_bytes(b"")
        out.mkdir(exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps({}))
    (out / "notes.txt").write_text("mine")
    result, _ = run("--policies", "models", "--out", str(out), "--answers", str(answers))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["dpo-0.json", "notes.txt"]
    assert [path.name for path in answers.iterdir()] == ["dpo-0"]


def test_one_cell_is_asked_for_by_name(run, tmp_path):
    words = ["--variant", "bdpo", "--seed", "7", "--policy", "here", "--metrics", str(tmp_path / "m.json")]
    result, [cell] = run(*words)
    assert result.exit_code == 0 and (cell.name, cell.policy.name, cell.answers) == ("bdpo-7", "here", None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--variant", "dpo", "--seed", "0"], "--policy, --metrics absent"),
        (["--policies", "models"], "all cells need --policies and --out"),
        (["--set", "evaluate.suites={mine: {files: [a.jsonl]}}"], "evaluate.suites names mine"),
        ([], "all cells need --policies and --out"),
    ],
)
def test_half_a_request_says_what_is_absent(run, words, said):
    result, asked = run(*words)
    assert result.exit_code == 2 and said in result.output and not asked
