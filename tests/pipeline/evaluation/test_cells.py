"""Evaluating policies with the real engine, against exact values; and what is refused before it starts."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cache import CacheIncomplete, CacheMismatch, logps_table, prompt_key, publish_reference
from pipeline.data.tables import read_pairs, read_responses
from pipeline.engine import process
from pipeline.engine.rows import engine_rows, token_arrays
from pipeline.errors import RequestError, RunFailed
from pipeline.evaluation import answers_table
from pipeline.evaluation.answers_table import true_rewards
from pipeline.evaluation.cells import evaluate_cells
from pipeline.evaluation.questions import Cell
from pipeline.evaluation.sampling import choose_prompts
from pipeline.params import EvaluateParams, ScoreParams
from pipeline.policies import engines
from pipeline.reference.identity import reference_identity
from tests.tiny import POSITIONS, VOCABULARY, write_model, write_pairs
from tests.tiny_reference import quick_engine, transformers_token_logps

ENGINE = ScoreParams(enforce_eager=True, rows_per_call=16)
BETA = 0.5


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with quick_engine() as patch:
        patch.setenv("REFCACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 24, test_share=0.5)


def response_sums(model, responses):
    """Summed log-prob of each response by key, from transformers."""
    rows = engine_rows(responses)
    whole = transformers_token_logps(model, rows)
    sums = [logps[len(prompt) - 1 :].sum(dtype=np.float64) for logps, (prompt, _) in zip(whole, rows, strict=True)]
    return dict(zip(responses["response_key"], sums, strict=True))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, model, pairs):
    """A cache of transformers' own values, so that what evaluate computes is checked from outside."""
    responses = read_responses(pairs)
    rows = engine_rows(responses)
    whole = transformers_token_logps(model, rows)
    table = logps_table(
        response_keys=responses["response_key"].to_list(),
        prompt_keys=responses["prompt_key"].to_list(),
        n_prompt_tokens=[len(prompt) for prompt, _ in rows],
        token_ids=[response for _, response in rows],
        token_logps=[logps[len(prompt) - 1 :] for logps, (prompt, _) in zip(whole, rows, strict=True)],
    )
    folder = tmp_path_factory.mktemp("reference")
    publish_reference(folder, table, reference_identity(model, dtype="float32", quantization=None))
    return folder


@pytest.fixture
def evaluate(tmp_path, model, pairs, reference):
    def call(policy=model, params=EvaluateParams(), **changes):  # noqa: B008 (frozen)
        options = {"pairs": pairs, "reference": reference, "engine": ENGINE} | changes
        cell = Cell("dpo", 3, BETA, policy, tmp_path / "results" / "evaluate.json", tmp_path / "answers")
        return evaluate_cells([cell], reference_model=model, params=params, **options).cells["dpo-3"]

    return call


@pytest.fixture
def no_model_loads(monkeypatch):
    monkeypatch.setattr(process.EngineProcess, "load", lambda *_, **__: pytest.fail("an engine was built"))


# without an engine ----------------------------------------------------------------------------------------------------


def test_no_test_pairs_says_how_to_get_some(evaluate, tmp_path, no_model_loads):
    with pytest.raises(RequestError, match=r"no test pairs.*prepare\.test_share"):
        evaluate(pairs=write_pairs(tmp_path / "train-only", 4, test_share=0.0))


def test_answers_beyond_the_models_positions_are_refused_with_the_most_that_fits(evaluate, pairs, no_model_loads):
    test = read_responses(pairs).filter(pl.col("split") == "test")
    longest = test["prompt_ids"].list.len().max()
    with pytest.raises(RequestError, match=rf"max_new_tokens is 300.*Set it to {POSITIONS - longest} or less"):
        evaluate(params=EvaluateParams(prompts=100, max_new_tokens=300))


def test_a_cache_of_another_reference_is_refused(evaluate, no_model_loads):
    with pytest.raises(CacheMismatch, match="dtype"):
        evaluate(engine=ScoreParams(dtype="bfloat16"))


def test_test_responses_that_were_never_scored_are_refused(evaluate, tmp_path, no_model_loads):
    with pytest.raises(CacheIncomplete, match="dvc repro score"):
        evaluate(pairs=write_pairs(tmp_path / "other", 4, test_share=1.0, seed=9))


def demo(prompts, rewards):
    keys = [prompt_key([n]) for n in range(len(prompts))]
    return pl.DataFrame({"prompt_text": prompts, "reward": rewards, "prompt_key": keys})


@pytest.mark.parametrize(
    ("prompts", "rewards", "is_demo"),
    [
        (["Compute 3 + 4.", "Compute 1 + 1."], [1.0, 0.5], True),
        (["Compute 3 + 4.", "What is love?"], [1.0, 0.5], False),
        (["Compute 3 + 4.", "Compute 1 + 1."], [1.0, None], False),
    ],
)
def test_true_rewards_are_claimed_for_the_generated_dataset_alone(prompts, rewards, is_demo, monkeypatch):
    monkeypatch.setattr(answers_table, "texts", lambda rows, *_: ["Answer: 7"] * len(rows))
    table = demo(prompts, rewards)
    found = true_rewards(table, table, Path("tokenizer"), False)
    assert (found is not None) is is_demo
    if is_demo:
        assert found[0] == 3.0 and found[1] < 3.0  # right and in the right form; wrong


# with the real one ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_reference_as_its_own_policy_has_moved_nowhere(evaluate, pairs, tmp_path):
    found = evaluate(params=EvaluateParams(prompts=5, samples_per_prompt=3, max_new_tokens=20))
    assert json.loads((tmp_path / "results" / "evaluate.json").read_text()) == found
    test = read_pairs(pairs, "test")
    assert (found["variant"], found["seed"], found["split"], found["pairs"]) == ("dpo", 3, "test", len(test))
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected", "kl"):
        assert found[name] == pytest.approx(0, abs=1e-4)
    assert found["kl_standard_error"] < 1e-4 and found["samples"] == 15
    for name, value in found["reference"].items():
        assert found[name] == pytest.approx(value, abs=1e-4)
    categories = found["categories"]
    assert {name: part["pairs"] for name, part in categories.items()} == dict(test["category"].value_counts().rows())
    assert "expected_reward" not in found


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model):
    """A LoRA policy that has moved away from the reference, and the same merged, for transformers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    folder, merged = tmp_path_factory.mktemp("adapter"), tmp_path_factory.mktemp("merged")
    policy.save_pretrained(folder)
    policy.merge_and_unload().save_pretrained(merged)
    return folder, merged


def exact_kl(policy, reference, prompts):
    """Mean over prompts of KL(policy || reference) of the next token."""
    rows = [(prompt, np.array([token])) for prompt in prompts for token in range(VOCABULARY)]
    p, q = (
        np.array([logps[-1] for logps in transformers_token_logps(model, rows)], np.float64).reshape(-1, VOCABULARY)
        for model in (policy, reference)
    )
    return (np.exp(p) * (p - q)).sum(axis=1).mean()


@pytest.mark.slow
def test_a_lora_policy_is_measured_as_its_merged_weights(evaluate, adapter, model, pairs):
    folder, merged = adapter
    found = evaluate(policy=folder, params=EvaluateParams(prompts=6, samples_per_prompt=300, max_new_tokens=1))
    responses = read_responses(pairs).filter(pl.col("split") == "test")
    policy, reference = response_sums(merged, responses), response_sums(model, responses)
    test = read_pairs(pairs, "test")
    margins = [
        BETA * (policy[chosen] - reference[chosen] - policy[rejected] + reference[rejected])
        for chosen, rejected in zip(test["chosen_key"], test["rejected_key"], strict=True)
    ]
    assert found["rewards/margins"] == pytest.approx(np.mean(margins), abs=1e-3)
    assert found["rewards/accuracies"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert found["logps/chosen"] == pytest.approx(np.mean([policy[key] for key in test["chosen_key"]]), abs=1e-3)
    prompts = token_arrays(choose_prompts(responses, 6)["prompt_ids"])
    exact = exact_kl(merged, model, prompts)
    assert exact > 0.05  # else this shows nothing
    # The prompts are the same ones, so only the draw of answers is left to chance.
    assert found["kl"] == pytest.approx(exact, abs=0.1 * exact + 0.02)


class Asked:
    """Counts what engines are asked; fails the call after `calls`."""

    def __init__(self, monkeypatch):
        self.rows, self.prompts, self.calls = [], [], None
        score, generate = process.EngineProcess.score, process.EngineProcess.generate

        def counted(engine, rows, advance):
            if self.calls is not None:
                self.calls -= 1
                if self.calls < 0:
                    engine.kill()
                    raise KeyboardInterrupt
            self.rows += [(engine.pid, prompt.tobytes(), response.tobytes()) for prompt, response in rows]
            return score(engine, rows, advance)

        def drawn(engine, prompts, advance, **options):
            self.prompts += [prompt.tobytes() for prompt in prompts]
            return generate(engine, prompts, advance, **options)

        monkeypatch.setattr(process.EngineProcess, "score", counted)
        monkeypatch.setattr(process.EngineProcess, "generate", drawn)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(engines.PolicyEngines, "_proves", lambda *_: True)  # its rows are not counted
    return Asked(monkeypatch)


@pytest.fixture
def sweep(tmp_path, model, pairs, reference):
    def run(policies, **changes):
        cells = [Cell(name, 0, BETA, folder, tmp_path / f"{name}.json") for name, folder in policies.items()]
        params = EvaluateParams(prompts=4, samples_per_prompt=2, max_new_tokens=10)
        options = {"pairs": pairs, "reference": reference, "engine": ENGINE, "params": params} | changes
        return evaluate_cells(cells, reference_model=model, **options)

    return run


@pytest.mark.slow
def test_many_cells_share_an_engine_and_nothing_is_asked_twice(sweep, asked, pairs, tmp_path):
    policies = {name: write_model(tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1)}
    done = sweep(policies)
    test = read_responses(pairs).filter(pl.col("split") == "test")
    assert (done.starts, done.asked, len(asked.prompts)) == (1, 2, 3 * 4)  # the reference's prompts too
    per_policy = len(test) + 2 * 4 * 2  # its answers and the reference's
    assert len(asked.rows) == 2 * per_policy + 3 * 4 * 2
    for name, folder in policies.items():
        sums = response_sums(folder, test)
        chosen = [sums[key] for key in read_pairs(pairs, "test")["chosen_key"]]
        assert done.cells[f"{name}-0"]["logps/chosen"] == pytest.approx(np.mean(chosen), abs=1e-3)

    rows, prompts = len(asked.rows), len(asked.prompts)
    assert sweep(policies) == done._replace(starts=0, asked=0)
    assert (len(asked.rows), len(asked.prompts)) == (rows, prompts)

    policies["b"] = write_model(tmp_path / "changed", seed=7)
    again = sweep(policies)
    assert (again.starts, again.asked, len(asked.prompts) - prompts) == (1, 1, 4)
    assert len(asked.rows) - rows == per_policy + 4 * 2
    assert again.cells["a-0"] == done.cells["a-0"] and again.cells["b-0"] != done.cells["b-0"]


@pytest.mark.slow
def test_what_was_measured_before_a_kill_is_kept(sweep, asked, tmp_path, monkeypatch):
    policies = {"a": write_model(tmp_path / "a", seed=1)}
    asked.calls = 2
    with pytest.raises(KeyboardInterrupt):
        sweep(policies)
    before, asked.calls = len(asked.rows), None
    assert before > ENGINE.rows_per_call  # two calls
    resumed, rows = sweep(policies), len(asked.rows)
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "other"))
    assert sweep(policies).cells == resumed.cells
    assert len(asked.rows) - rows == rows  # as many with and without the kill: none was asked again


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_takes_no_other_with_it(sweep, asked, tmp_path):
    policies = {"gone": tmp_path / "gone", "a": write_model(tmp_path / "a", seed=1)}
    (tmp_path / "broken").mkdir()
    policies["broken"] = tmp_path / "broken"
    with pytest.raises(RunFailed, match=r"2 of 3 cells.*\n  gone-0: .*not exist.*\n  broken-0: .*no \*\.saf"):
        sweep(policies)
    assert (tmp_path / "a.json").exists() and not (tmp_path / "gone.json").exists()


@pytest.mark.slow
def test_an_engine_that_dies_costs_its_cell_alone(sweep, asked, tmp_path, monkeypatch):
    policies = {name: write_model(tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1)}
    exchange = process.EngineProcess.exchange

    def dies(engine, folder):
        exchange(engine, folder)
        if folder.name == "a":
            os.kill(engine.pid, signal.SIGKILL)

    monkeypatch.setattr(process.EngineProcess, "exchange", dies)
    with pytest.raises(RunFailed, match=r"1 of 2 cells.*\n  a-0: .*killed by signal 9"):
        sweep(policies)
    assert (tmp_path / "b.json").exists()
