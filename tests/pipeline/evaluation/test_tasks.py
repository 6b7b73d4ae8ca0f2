"""Benchmark tasks in an evaluation of cells: beside the reference's figures, and nothing asked twice."""

import json

import polars as pl
import pytest

pytest.importorskip("lm_eval")

from pipeline.engine import process
from pipeline.errors import RequestError
from pipeline.evaluation.cells import evaluate_cells
from pipeline.evaluation.questions import Cell
from pipeline.params import EvaluateParams, ScoreParams
from tests.pipeline.harness.small_tasks import of_hf, write_chat_model, write_tasks
from tests.tiny import write_pairs, write_reference_cache
from tests.tiny_reference import quick_engine

ENGINE = ScoreParams(enforce_eager=True, rows_per_call=64)


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Policies `a` and `b` of one shape; both and the reference answer differently."""
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
    reference = write_chat_model(tmp_path / "reference")
    policies = {name: write_chat_model(tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1)}
    pairs = write_pairs(tmp_path / "pairs", 8, test_share=0.5)
    cache = write_reference_cache(tmp_path / "cache", pairs, reference)
    cells = [
        Cell(name, 0, 0.1, folder, tmp_path / f"{name}-0.json", tmp_path / "answers" / f"{name}-0")
        for name, folder in policies.items()
    ]

    def call(**changes):
        params = EvaluateParams(prompts=0, **changes)
        with quick_engine():
            return evaluate_cells(
                cells, pairs=pairs, reference_model=reference, reference=cache, params=params, engine=ENGINE
            )

    return call


@pytest.mark.slow
def test_every_cell_has_its_tasks_beside_the_references(evaluate, tmp_path, monkeypatch):
    tasks = write_tasks(tmp_path)
    done = evaluate(tasks=[str(tasks)], max_length=200)
    assert done.starts == 1 and done.asked == 2
    theirs = {name: of_hf(tmp_path / name, tasks, max_length=200, template=True) for name in ("a", "b", "reference")}
    for name in ("a", "b"):
        found = json.loads((tmp_path / f"{name}-0.json").read_text())["tasks"]
        assert found == done.cells[f"{name}-0"]["tasks"]
        assert found.keys() == {"small_choice", "small_text"}
        for task, figures in found.items():
            assert figures["samples"] == 20
            for who, metrics in ((name, figures["metrics"]), ("reference", figures["reference"])):
                assert {key: metric["value"] for key, metric in metrics.items()} == {
                    key: value
                    for key, value in theirs[who]["results"][task].items()
                    if "," in key and "_stderr" not in key
                }
    for who in ("a-0", "b-0", "reference"):
        table = pl.read_parquet(tmp_path / "answers" / who / "small_text.parquet")
        samples = theirs[who.removesuffix("-0")]["samples"]["small_text"]
        assert set(table["answer"]) == {sample["resps"][0][0] for sample in samples}
        assert (tmp_path / "answers" / who / "small_choice.parquet").exists()

    monkeypatch.setattr(process.EngineProcess, "load", lambda *_, **__: pytest.fail("an engine was built"))
    assert evaluate(tasks=[str(tasks)], max_length=200) == done._replace(starts=0, asked=0)


def test_tasks_are_checked_before_an_engine_starts(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(process.EngineProcess, "load", lambda *_, **__: pytest.fail("an engine was built"))
    with pytest.raises(RequestError, match="absent, which does not exist"):
        evaluate(tasks=[str(tmp_path / "absent")])
    with pytest.raises(RequestError, match=r"up to 24 tokens.*room for 20"):
        evaluate(tasks=[str(write_tasks(tmp_path))], max_length=20)


def test_without_tasks_there_is_no_word_of_them(evaluate, monkeypatch):
    from pipeline.policies.answers import Answers

    monkeypatch.setattr(Answers, "score", lambda *_: None)
    monkeypatch.setattr(Answers, "sums", lambda _: Ones())
    assert all("tasks" not in cell for cell in evaluate().cells.values())


class Ones(dict):
    def __missing__(self, key):
        return -1.0
