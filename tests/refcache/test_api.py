"""What notebooks import: values against transformers' own, and every example of docs/api.md."""

import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import refcache
from cache import CacheIncomplete, open_reference
from pipeline.errors import RequestError
from refcache import objectives
from tests import ROOT
from tests.refcache.project import PREPARE, plain_logps, write_project
from tests.tiny_reference import quick_engine

RENDERED = "<|user|>{}<|assistant|>"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project, which is not to be changed."""
    root = tmp_path_factory.mktemp("project")
    write_project(root)
    return root


@pytest.fixture
def place(root, monkeypatch):
    """The project as working folder; its cache, and its pairs as people hold them."""
    monkeypatch.chdir(root)
    monkeypatch.delenv("REFCACHE_HOME", raising=False)
    table = pl.read_parquet("data/prepared/pairs/pairs.parquet")
    pairs = table.select(prompt="prompt_text", chosen="chosen_text", rejected="rejected_text")
    cache = refcache.Cache("data/reference/logps", tokenizer="data/prepared/tokenizer", prepare=PREPARE)
    return SimpleNamespace(root=root, table=table, pairs=pairs, cache=cache)


def test_texts_messages_and_ids_find_the_reference_s_values(place):
    prompt, chosen, _ = place.pairs.row(0)
    expected = plain_logps(place.root / "models/reference", RENDERED.format(prompt), chosen)
    for asked in (prompt, [{"role": "user", "content": prompt}]):
        assert place.cache.token_logps(asked, chosen) == pytest.approx(expected, abs=1e-4)
    assert place.cache.logp(prompt, chosen) == pytest.approx(sum(expected), abs=1e-3)
    row = place.cache.scan().collect().row(0, named=True)
    prompt_ids = pl.read_parquet("data/prepared/pairs/responses.parquet").filter(response_key=row["response_key"])
    found = refcache.Cache("data/reference/logps").token_logps(prompt_ids["prompt_ids"][0], row["token_ids"])
    assert found.tolist() == row["token_logps"]
    assert len(place.cache) == open_reference("data/reference/logps", expect=None).n_rows


def test_joined_pairs_come_in_order_with_the_store_s_own_rows(place):
    joined = place.cache.join(place.pairs)
    assert joined["row"].to_list() == list(range(len(place.table)))
    assert joined.select("chosen_key", "rejected_key").equals(place.table.select("chosen_key", "rejected_key"))
    stored = place.cache.scan().collect()
    for side in ("chosen", "rejected"):
        rows = place.table.select(response_key=f"{side}_key").join(stored, on="response_key", maintain_order="left")
        assert joined[f"{side}_logp"].equals(rows["sum_logp"])
        assert joined[f"{side}_tokens"].to_list() == rows["n_tokens"].to_list()
        assert joined[f"{side}_token_logps"].to_list() == rows["token_logps"].to_list()
    assert joined["margin"].equals(joined["chosen_logp"] - joined["rejected_logp"])
    assert place.cache.join([]).schema == joined.schema


def test_what_is_missing_or_unusable_is_named_by_its_row(place):
    rows = place.pairs.head(3).to_dicts()
    with pytest.raises(CacheIncomplete, match=r"Row 2, its rejected response: .* the closest shares"):
        place.cache.join([*rows[:2], rows[2] | {"rejected": "something else"}])
    with pytest.raises(RequestError, match=r"(?s)2 rows can't be used:\n  row 0: .*\n  row 2: "):
        place.cache.join([{"question": "?"}, rows[0], rows[1] | {"rejected": ""}])
    with pytest.raises(RequestError, match="opened without a tokenizer"):
        refcache.Cache("data/reference/logps").logp("a", "b")
    short = PREPARE.model_copy(update={"max_prompt_tokens": 3, "on_bad_row": "skip"})
    skipping = refcache.Cache("data/reference/logps", tokenizer="data/prepared/tokenizer", prepare=short)
    with pytest.warns(UserWarning, match=r"3 rows can't be used:\n  row 0: the prompt has .* tokens, more than 3"):
        assert skipping.join(rows).is_empty()


@pytest.mark.slow
def test_ids_that_are_none_are_refused_and_never_rounded_or_wrapped(place):
    row = pl.read_parquet("data/prepared/pairs/responses.parquet").row(0, named=True)
    prompt, response = row["prompt_ids"], row["response_ids"]
    assert len(place.cache.token_logps(np.array(prompt, np.int64), np.array(response, np.uint32))) == len(response)
    for changed in (np.array(response) + 0.25, np.array(response) + 2**32, np.array([response]), [-1]):
        with pytest.raises(ValueError, match="response_ids must"):
            place.cache.token_logps(prompt, changed)
    with pytest.raises(ValueError, match="prompt_ids must"):
        place.cache.token_logps([token + 0.25 for token in prompt], response)
    for asked in ([], response), (prompt, []):
        with pytest.raises(RequestError, match="holds no token"):
            refcache.Cache("data/reference/logps").logp(*asked)
    for asked in (None, "x"), (3, "x"), (prompt, {"role": "assistant", "content": "x"}):
        with pytest.raises(RequestError, match=r"no prompt|prompt is"):
            place.cache.logp(*asked)


def test_sides_that_are_the_same_tokens_make_no_pair(place):
    rows = [{"prompt": "Same?", "chosen": "word " * 600 + end, "rejected": "word " * 600} for end in ("a", "b")]
    for asked in (place.cache.join, lambda pairs: refcache.score(pairs, "models/reference", prepare=PREPARE)):
        with pytest.raises(RequestError, match=r"2 rows can't be used:\n  row 0: .* identical after truncation"):
            asked(rows)


def test_what_are_no_rows_is_said_with_what_would_be(place):
    for pairs in (place.pairs.lazy(), place.pairs.to_arrow(), place.pairs.row(0, named=True), "pairs.jsonl", 3):
        with pytest.raises(RequestError, match="expected a polars DataFrame or a list of rows"):
            place.cache.join(pairs)
    with pytest.raises(RequestError, match="Row 1 of the pairs is tuple"):
        place.cache.join([place.pairs.row(0, named=True), place.pairs.row(1)])
    with pytest.raises(RequestError, match="no pair to score"):
        refcache.score([], "models/reference")


def test_implicit_rewards_of_a_folder_a_model_and_an_adapter(place, tmp_path):
    policy, pairs = place.root / "models/policies/dpo-0", place.pairs.head(4)
    found = refcache.implicit_rewards(policy, pairs, place.cache, beta=0.5)
    for row in found.to_dicts():
        for side in ("chosen", "rejected"):
            of_policy, of_reference = (
                sum(plain_logps(place.root / model, RENDERED.format(row["prompt"]), row[side]))
                for model in ("models/policies/dpo-0", "models/reference")
            )
            assert row[f"{side}_policy_logp"] == pytest.approx(of_policy, abs=1e-3)
            assert row[f"{side}_reward"] == pytest.approx(0.5 * (of_policy - of_reference), abs=1e-3)
        assert row["correct"] == (row["chosen_reward"] > row["rejected_reward"])
    loaded = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).train()
    assert refcache.implicit_rewards(loaded, pairs, place.cache, beta=0.5).equals(found)
    assert loaded.training
    torch.manual_seed(0)
    adapted = get_peft_model(loaded, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    of_adapter = refcache.implicit_rewards(adapted, pairs, place.cache, beta=0.5)
    assert (of_adapter["chosen_reward"] - found["chosen_reward"]).abs().min() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    again = refcache.implicit_rewards(tmp_path / "adapter", pairs, place.cache, beta=0.5, base=policy)
    assert again["reward_margin"].to_list() == pytest.approx(of_adapter["reward_margin"].to_list(), abs=1e-3)
    with pytest.raises(RequestError, match="base='models/reference'"):
        refcache.implicit_rewards(tmp_path / "adapter", pairs, place.cache, beta=0.5)


def test_objectives_take_such_a_frame(place):
    rewards = refcache.implicit_rewards("models/policies/dpo-0", place.pairs.head(4), place.cache, beta=0.1)
    loss = objectives.dpo(objectives.pair_logps(rewards, torch.float64), beta=0.1)
    assert loss.tolist() == pytest.approx(np.log1p(np.exp(-rewards["reward_margin"].to_numpy())).tolist())
    assert set(objectives.OBJECTIVES) >= {"dpo", "bdpo", "bpo"}


@pytest.mark.slow
def test_every_example_of_the_document_runs_and_scores_once(place, monkeypatch):
    """With vLLM itself."""
    (place.root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    examples = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/api.md").read_text(), re.M | re.S))
    assert {f"refcache.{name}(" for name in refcache.__all__} <= set(re.findall(r"refcache\.\w+\(", examples))
    names = {}
    with quick_engine():
        exec(compile(examples, "docs/api.md", "exec"), names)
    scored = names["scored"].row(0, named=True)
    prompt, chosen, _ = place.pairs.row(0)
    assert scored["chosen_logp"] == pytest.approx(place.cache.logp(prompt, chosen), abs=1e-3)
    expected = plain_logps(place.root / "models/reference", RENDERED.format(prompt), "No.")
    assert scored["rejected_token_logps"] == pytest.approx(expected, abs=1e-3)

    def refuse(*what):
        raise AssertionError("an engine was started")

    monkeypatch.setattr("pipeline.engine.process.start_server", refuse)
    again = refcache.score(names["mine"], "models/reference", out="mine")
    assert again.equals(names["scored"])
    published = refcache.Cache("mine").scan().collect()
    assert set(published["response_key"]) == {scored["chosen_key"], scored["rejected_key"]}


@pytest.mark.slow
def test_importing_it_loads_nothing_heavy_and_no_engine():
    code = (
        "import sys, refcache; early = set(sys.modules); from refcache import Cache; print(*early, '|', *sys.modules)"
    )
    early, late = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("|")
    assert not {"torch", "transformers", "polars", "pyarrow"} & set(early.split())
    assert not {"torch", "vllm", "deepspeed"} & set(late.split())
