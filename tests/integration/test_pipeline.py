"""The whole pipeline through `dvc repro`, as a user runs it, on a few dozen pairs in files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from ruamel.yaml import YAML

from tests import ROOT, stand_in

pytestmark = pytest.mark.slow

TINY = {  # head size 32, the smallest that vLLM has CPU kernels for
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def pair(number: int, answer: int) -> str:
    """One pair; all pairs of a number share prompt and chosen response."""
    row = {
        "prompt": f"What is {number} plus {number}?",
        "chosen": f"It is {2 * number}.",
        "rejected": f"It is {answer}.",
    }
    return json.dumps(row) + "\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A clone's worth of files with small parameters and data of its own."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load(ROOT / "params.yaml")
    params["model"]["scratch"] |= {"vocabulary_size": 300, "config": TINY}
    params["prepare"] |= {"source": "files", "files": {"pairs": ["pairs.jsonl"]}, "test_share": 0.25}
    params["prepare"]["sft"] = {"source": "files", "files": ["sft.jsonl"]}
    params["sft"]["epochs"] = 1.0
    params["train"]["epochs"] = 1.0
    params["sweep"]["variants"] = ["bdpo"]
    params["evaluate"] |= {"prompts": 4, "samples_per_prompt": 2, "max_new_tokens": 8}
    (folder / "params.yaml").write_text(json.dumps(params))
    data = folder / "data/input"
    data.mkdir(parents=True)
    sft = [json.dumps({"prompt": f"What is {n} plus 1?", "completion": f"It is {n + 1}."}) for n in range(64)]
    (data / "sft.jsonl").write_text("\n".join(sft))
    (data / "pairs.jsonl").write_text("".join(pair(n, 2 * n + a) for n in range(40) for a in (3, 500)))
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
        subprocess.run(["git", *identity, *command], cwd=folder, check=True)
    return folder


def dvc(project: Path, *words: str, **changes: str) -> str:
    """Run dvc there, with other environment variables; returns what it printed, for `Running stage` lines."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | changes | {"PATH": path, "TORCHDYNAMO_DISABLE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [changes.get("PYTHONPATH"), str(ROOT)]))
    environment.pop("REFCACHE_HOME", None)
    done = subprocess.run(["dvc", *words], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def score_metrics(project: Path) -> dict:
    return json.loads((project / "results/score/metrics.json").read_text())


@pytest.fixture(scope="module")
def first_run(project) -> list[str]:
    return ran(dvc(project, "repro"))


def test_one_command_runs_every_stage_and_scores_shared_responses_once(project, first_run):
    beside = ["sketch", "constraint@bdpo", "suites"]  # for which not all wait
    order = [stage for stage in first_run if stage not in [*beside, "suites", "sample"]]
    assert order == ["prepare", "sft", "score", "train@bdpo-0", "evaluate", "report"]
    waited_for = ["sketch", "constraint@bdpo", "train@bdpo-0"]
    assert [stage for stage in first_run if stage in waited_for] == waited_for
    assert [stage for stage in first_run if stage in ("prepare", "suites", "score")] == ["prepare", "suites", "score"]
    assert json.loads((project / "data/reference/sketches/manifest.json").read_text())["identity"]["mode"] == "none"
    pairs = pl.read_parquet(project / "data/prepared/pairs/pairs.parquet")
    assert len(pairs) == 80 and set(pairs["split"]) == {"train", "test"}
    assert score_metrics(project)["rows_scored"] == 120  # 40 chosen, shared by two pairs each, and 80 rejected
    assert pl.scan_parquet(project / "data/reference/logps/*.parquet").collect().height == 120
    assert (project / "report/index.html").stat().st_size > 100_000
    first = (project / "results/bdpo-0/history.tsv").read_text().splitlines()[1].split("\t")
    assert float(first[2]) == pytest.approx(0.693147, abs=1e-4)
    assert {"kl", "dcr", "rewards/accuracies"} <= json.loads(
        (project / "results/evaluate/bdpo-0.json").read_text()
    ).keys()


def test_a_second_run_does_nothing(project, first_run):
    assert ran(dvc(project, "repro")) == []


def test_new_sketches_train_only_variants_that_read_them(project, first_run):
    text = (project / "params.yaml").read_text()
    params = json.loads(text)
    params["sketch"] |= {"mode": "tensorsketch", "k": 16, "audit": 16}
    (project / "params.yaml").write_text(json.dumps(params))
    assert ran(dvc(project, "repro", "constraint")) == ["sketch", "constraint@bdpo"]
    assert ran(dvc(project, "repro", "--dry")) == ["report"]  # which shows all figures
    (project / "params.yaml").write_text(text)
    dvc(project, "repro", "constraint")


def test_a_new_suite_is_scored_and_judged_by_and_trains_nothing(project, first_run):
    text = (project / "params.yaml").read_text()
    params = json.loads(text)
    params["evaluate"]["suites"] = {"sums": {"files": ["sums.jsonl"]}}
    (project / "params.yaml").write_text(json.dumps(params))
    (project / "data/input/sums.jsonl").write_text(pair(0, 3) + pair(200, 300) + pair(201, 300))
    before = {path: path.read_bytes() for path in (project / "data/reference/logps").iterdir()}
    asked = stand_in.environment({})
    assert set(ran(dvc(project, "repro", "score", **asked))) == {"prepare", "suites", "score"}  # the folder has a file
    assert score_metrics(project)["rows_scored"] == 4
    assert {path: path.read_bytes() for path in (project / "data/reference/logps").iterdir()} == before
    assert ran(dvc(project, "repro", "--dry")) == ["evaluate", "report"]
    dvc(project, "repro")
    judged = json.loads((project / "results/evaluate/bdpo-0.json").read_text())["suites"]["sums"]
    assert judged["pairs"] == 3 and judged["domain"] == "out" and 0 <= judged["reward_accuracy"]["value"] <= 1
    assert "sums" in (project / "report/index.html").read_text()
    (project / "data/input/sums.jsonl").unlink()
    (project / "params.yaml").write_text(text)
    dvc(project, "repro", "score")


def test_changing_a_beta_trains_evaluates_and_reports_but_scores_nothing(project, first_run):
    before = score_metrics(project)
    params = json.loads((project / "params.yaml").read_text())
    params["train"]["variants"]["bdpo"]["beta"] = 0.2
    (project / "params.yaml").write_text(json.dumps(params))
    # Its constraint is looked at again, and takes a second: what it says is not different.
    assert ran(dvc(project, "repro", "--dry")) == ["constraint@bdpo", "train@bdpo-0", "evaluate", "report"]
    assert score_metrics(project) == before


def test_five_per_cent_new_pairs_score_only_the_new_responses_and_leave_sft_alone(project, first_run):
    """By a stand-in for vLLM; what vLLM is asked for then is in tests/pipeline/reference/test_scoring.py."""
    reference = (project / "models/reference/model.safetensors").read_bytes()
    with (project / "data/input/pairs.jsonl").open("a") as file:
        file.write(pair(100, 203) + pair(100, 600) + pair(101, 205) + pair(0, 77))
    assert ran(dvc(project, "repro", "score", **stand_in.environment({}))) == ["prepare", "suites", "score"]
    metrics = score_metrics(project)
    assert (metrics["rows_scored"], metrics["rows_reused"]) == (6, 120)
    assert (project / "models/reference/model.safetensors").read_bytes() == reference


def test_bad_input_under_dvc_loses_nothing(project, first_run):
    kept = {file: file.read_bytes() for file in (project / "data/prepared").rglob("*") if file.is_file()}
    rows = project / "data/input/pairs.jsonl"
    good = rows.read_text()
    rows.write_text(good + "{broken\n")
    try:
        with pytest.raises(AssertionError, match=rf"pairs\.jsonl:{len(good.splitlines()) + 1}"):
            dvc(project, "repro", "prepare")
    finally:
        rows.write_text(good)
    assert {file: file.read_bytes() for file in (project / "data/prepared").rglob("*") if file.is_file()} == kept
    assert list((project / "data/reference/logps").glob("*.parquet"))
