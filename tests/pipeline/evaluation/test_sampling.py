"""Which prompts are sampled, what ends an answer, and the folder of a policy."""

import json
import os
import subprocess

import polars as pl
import pytest

from cache import prompt_key
from pipeline.errors import RequestError
from pipeline.evaluation.sampling import choose_prompts, stop_token_ids
from pipeline.trainable.merging import loadable
from tests.tiny import EOS, write_tokenizer


def answers(*responses, truncated=()):
    return pl.DataFrame(
        {
            "response_ids": list(responses),
            "truncated": [index in truncated for index in range(len(responses))],
        }
    )


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 40}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [41, 42]}))
    return tmp_path


def test_every_end_that_the_model_names_stops(model):
    assert stop_token_ids(model, answers([5, 6], [5, 7])) == [40, 41, 42]


def test_the_tokenizers_end_stops_too(model):
    write_tokenizer(model)
    assert stop_token_ids(model, answers([5, 6], [5, 7])) == [EOS, 40, 41, 42]


def test_the_token_that_ends_every_complete_response_stops(model):
    assert 9 in stop_token_ids(model, answers([5, 6, 9], [7, 9], [5, 6, 7], truncated={2}))


def test_a_last_token_that_also_stands_inside_does_not_stop(model):
    assert 9 not in stop_token_ids(model, answers([5, 9, 6, 9], [7, 9]))


def test_without_complete_responses_only_the_model_decides(model):
    assert stop_token_ids(model, answers([5, 9], truncated={0})) == [40, 41, 42]


def test_prompts_are_distinct_and_the_same_for_every_policy():
    prompts = [[n] for n in range(20)] * 2
    table = pl.DataFrame(
        {
            "prompt_key": [prompt_key(prompt) for prompt in prompts],
            "prompt_ids": prompts,
            "prompt_text": [f"p{prompt[0]}" for prompt in prompts],
        }
    )
    chosen = choose_prompts(table, 5)
    assert chosen["prompt_key"].to_list() == sorted(prompt_key([n]) for n in range(20))[:5]
    assert choose_prompts(table[::-1], 5).equals(chosen)
    assert choose_prompts(table, 0).is_empty()


def test_a_whole_policy_is_loaded_from_its_own_folder(model, tmp_path):
    with loadable(model, tmp_path / "reference") as folder:
        assert folder == model


def test_a_missing_policy_names_the_stage_that_writes_it(tmp_path):
    with pytest.raises(RequestError, match="dvc repro train"), loadable(tmp_path / "no", tmp_path):
        pass


def test_merges_of_dead_runs_are_removed_and_those_of_living_ones_kept(model, tmp_path, monkeypatch):
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, alive = (tmp_path / "home" / "tmp" / f"merged-{pid}-x" for pid in (dead.pid, os.getpid()))
    left.mkdir(parents=True)
    alive.mkdir()
    (model / "adapter_config.json").write_text("{")  # unreadable: merging fails, after the cleaning
    with pytest.raises(Exception, match=r"."), loadable(model, tmp_path / "reference"):
        pass
    assert not left.exists() and alive.exists()
    assert list((tmp_path / "home" / "tmp").iterdir()) == [alive]  # the failed merge left nothing
