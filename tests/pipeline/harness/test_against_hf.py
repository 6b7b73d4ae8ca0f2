"""The scores and every answer are those of the harness's own `hf` model, and nothing is asked twice."""

import json

import numpy as np
import pytest

from pipeline.engine.process import EngineProcess
from pipeline.engine.rows import EngineLength
from pipeline.harness.tasks import Tasks
from pipeline.model.tokenizer import open_tokenizer
from pipeline.params import EvaluateParams, ScoreParams
from pipeline.policies.answers import Answers
from pipeline.reference.identity import reference_identity
from tests.pipeline.harness.small_tasks import CAPITALS, of_hf, write_chat_model, write_tasks
from tests.tiny_reference import quick_engine

pytest.importorskip("lm_eval")

POSITIONS = 300
ENGINE = ScoreParams(enforce_eager=True, rows_per_call=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("model"), positions=POSITIONS)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    with quick_engine(), EngineProcess(ENGINE, log=tmp_path_factory.mktemp("log") / "engine.log") as process:
        process.load(model, EngineLength(POSITIONS + 1, True), sampling=True, tokenizer=model)
        yield process


@pytest.fixture
def run(model, engine, tmp_path, monkeypatch):
    """Calls the tasks; returns results and how often the engine was asked for."""
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))

    def call(tasks, **changes):
        stop = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
        made = Tasks(EvaluateParams(tasks=[str(tasks)], **changes), model, stop_token_ids=stop)
        made.check()
        used = []
        with Answers(reference_identity(model, dtype="float32", quantization=None), "a", rows_per_call=64) as book:
            found = made.run(book, lambda: used.append(1) or engine)
        assert made.longest <= POSITIONS and made.needs_tokenizer
        return found, len(used)

    return call


def same(ours, theirs):
    """Figures and every item."""
    assert ours.figures.keys() == theirs["results"].keys() == {"small_choice", "small_text"}
    for name, figures in ours.figures.items():
        assert (
            figures["samples"]
            == 20
            == len(theirs["samples"][name]) / len({sample["filter"] for sample in theirs["samples"][name]})
        )
        for key, metric in figures["metrics"].items():
            assert metric["value"] == theirs["results"][name][key]
            error = theirs["results"][name][key.replace(",", "_stderr,")]
            assert metric["standard_error"] == (None if error == "N/A" else error)
            assert metric["higher_is_better"] is True
    expected = {"acc,none", "acc_norm,none"}, {"exact_match,first-letter", "exact_match,all"}
    assert tuple(set(ours.figures[name]["metrics"]) for name in ("small_choice", "small_text")) == expected
    for name, table in ours.answers.items():
        samples = {(sample["doc_id"], sample["filter"]): sample for sample in theirs["samples"][name]}
        assert len(table) == len(samples)
        for row in table.iter_rows(named=True):
            sample = samples[row["doc_id"], row["filter"]]
            assert row["prompt"] == sample["arguments"][-1][0] and row["target"] == str(sample["target"])
            for metric in sample["metrics"]:
                assert row[metric] == sample[metric]
            if name == "small_text":
                assert row["answer"] == sample["resps"][0][0]
            else:
                expected = [response[0][0] for response in sample["resps"]]
                assert json.loads(row["answer"]) == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("template", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("long", [False, True], ids=["short", "truncated"])
def test_scores_and_answers_are_those_of_hf(run, model, tmp_path, template, long):
    tasks, length = write_tasks(tmp_path, long=long), 60 if long else POSITIONS - 1
    ours, _ = run(tasks, max_length=length, apply_chat_template=template)
    theirs = of_hf(model, tasks, max_length=length, template=template)
    same(ours, theirs)
    texts = ours.answers["small_text"]["answer"].to_list()
    cut = sum("the" in text for text in texts)
    assert cut == 0 and len(set(texts)) > 10  # else the comparison shows little
    found = ours.answers["small_text"].filter(filter="first-letter")["exact_match"]
    assert 0 <= found.mean() < 1
    again, used = run(tasks, max_length=length, apply_chat_template=template)
    assert used == 0 and again.figures == ours.figures
    assert all(again.answers[name].equals(ours.answers[name]) for name in ours.answers)


@pytest.mark.slow
def test_continuations_that_greedy_decoding_gives_are_told_from_others(engine, model, tmp_path, monkeypatch):
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from pipeline.harness.lm import Model, PolicyLM

    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
    tokenizer = open_tokenizer(model)
    theirs = HFLM(str(model), tokenizer=tokenizer, device="cpu", dtype="float32")
    requests = []
    for country in CAPITALS:
        context = f"The capital of {country} is"
        with torch.no_grad():
            likeliest = theirs.model(torch.tensor([tokenizer.encode(context)])).logits[0, -1].argmax()
        for continuation in (tokenizer.decode(likeliest), " Oslo"):
            requests.append(Instance("loglikelihood", {}, (context, continuation), 0, ("small", 0, 1)))
    with Answers(reference_identity(model, dtype="float32", quantization=None), "a", rows_per_call=64) as book:
        options = {"max_length": 200, "positions": POSITIONS, "stop_token_ids": [], "seed": 0}
        ours = PolicyLM(tokenizer, Model(book, lambda: engine), **options).loglikelihood(requests)
    logps, greedy = zip(*theirs.loglikelihood(requests, disable_tqdm=True), strict=True)
    assert [flag for _, flag in ours] == list(greedy) and 3 < sum(greedy) < 37
    assert np.allclose([logp for logp, _ in ours], logps, atol=1e-3)
