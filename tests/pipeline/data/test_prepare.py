"""What prepare promises about its outputs: keys, splits, counts, stability and determinism."""

import json
import os
import subprocess
import sys

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.keys import prompt_key, response_key
from pipeline.data.demo import true_reward
from pipeline.data.tables import SFT_SCHEMA, read_pairs, read_responses, read_sft
from pipeline.errors import RequestError
from pipeline.params import ModelParams, PrepareParams
from tests import ROOT
from tests.pipeline.data import chat_tokenizers
from tests.pipeline.data.preparing import digests, file_params, pair_rows, prepare_into, sft_rows, write_jsonl

DEMO = PrepareParams.model_validate({"demo": {"prompts": 40, "sft_rows": 60}})


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "in" / "pairs.jsonl", pair_rows(20))
    write_jsonl(tmp_path / "in" / "sft.jsonl", sft_rows(20))
    return tmp_path / "in"


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    chat_tokenizers.plain().save_pretrained(path)
    return ModelParams(name=str(path))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, prepare_into(out, DEMO)


# keys and tables ------------------------------------------------------------------------------------------------------


def test_keys_are_those_of_the_stored_token_ids_and_every_pair_finds_its_responses(demo):
    out, _ = demo
    pairs, responses = read_pairs(out / "pairs"), read_responses(out / "pairs")
    for row in responses.iter_rows(named=True):
        assert row["prompt_key"] == prompt_key(row["prompt_ids"])
        assert row["response_key"] == response_key(row["prompt_ids"], row["response_ids"])
    keys = responses["response_key"].to_list()
    assert keys == sorted(set(keys))
    assert set(pairs["chosen_key"]) | set(pairs["rejected_key"]) == set(keys)
    assert pairs["pair_id"].to_list() == list(range(len(pairs)))
    side = dict(zip(keys, responses["split"], strict=True))
    assert all(side[row["chosen_key"]] == row["split"] for row in pairs.iter_rows(named=True))


def test_the_demos_reward_can_be_computed_from_the_stored_texts(demo):
    out, _ = demo
    for row in read_responses(out / "pairs").iter_rows(named=True):
        assert row["reward"] == pytest.approx(true_reward(row["prompt_text"], row["response_text"]), abs=1e-6)


def test_the_stored_ids_decode_to_the_rendered_texts(demo):
    from transformers import AutoTokenizer

    out, _ = demo
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    for table in (read_responses(out / "pairs"), read_sft(out / "sft.parquet")):
        for row in table.iter_rows(named=True):
            assert tokenizer.decode(row["prompt_ids"]) == f"<|user|>{row['prompt_text']}<|assistant|>"
            assert tokenizer.decode(row["response_ids"]) == f"{row['response_text']}<|end|>"


def test_the_summary_counts_what_the_tables_hold(demo):
    out, summary = demo
    pairs, responses = read_pairs(out / "pairs"), read_responses(out / "pairs")
    assert json.loads((out / "summary.json").read_text()) == summary
    for side in ("train", "test"):
        assert summary["pairs"][side] == len(pairs.filter(pl.col("split") == side)) > 0
        assert summary["prompts"][side] == pairs.filter(pl.col("split") == side)["prompt_key"].n_unique()
    assert summary["distinct_responses"] == len(responses) < 2 * len(pairs)
    assert summary["tokens"]["responses"] == responses["response_ids"].list.len().sum()
    assert summary["tokens"]["prompts"] == responses.unique("prompt_key")["prompt_ids"].list.len().sum()
    assert summary["sft_rows"] == len(read_sft(out / "sft.parquet")) == 60
    assert sum(summary["category_counts"].values()) == len(pairs)
    assert summary["skipped_rows"] == {"count": 0, "examples": []}


@pytest.mark.slow
def test_a_second_process_writes_the_same_bytes(demo, tmp_path):
    out, _ = demo
    code = (
        "import sys; from pathlib import Path; from tests.pipeline.data.preparing import *; "
        "from tests.pipeline.data.test_prepare import DEMO; prepare_into(Path(sys.argv[1]), DEMO)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345", "RAYON_NUM_THREADS": "1"}
    root = ROOT
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], cwd=root, env=environment, check=True)
    assert digests(tmp_path / "again") == digests(out)


def test_no_output_names_a_place_of_this_machine(demo):
    out, _ = demo
    assert not any(str(out).encode() in path.read_bytes() for path in out.rglob("*") if path.is_file())


# the split ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.sets(st.integers(0, 30), min_size=1), more=st.sets(st.integers(31, 60)), seed=st.integers(0, 5))
def test_no_prompt_is_on_both_sides_and_none_changes_sides_when_pairs_are_added(
    plain_model, tmp_path, first, more, seed
):
    sides = []
    for numbers in (sorted(first), sorted(first | more)):
        rows = [row for n in numbers for row in (pair_rows(1, n)[0], pair_rows(1, n)[0] | {"rejected": "No."})]
        write_jsonl(tmp_path / "in" / "pairs.jsonl", rows)
        params = file_params(tmp_path / "in", sft={"source": "none"}, split_seed=seed, test_share=0.4)
        try:
            prepare_into(tmp_path / "out", params, plain_model)
        except RequestError as error:
            assert "no usable train pair" in str(error)
            return
        pairs = read_pairs(tmp_path / "out" / "pairs")
        assert pairs.group_by("prompt_key").agg(pl.col("split").n_unique())["split"].max() == 1
        assert len(pairs) == len(rows)
        sides.append(dict(zip(pairs["prompt_text"], pairs["split"], strict=True)))
    assert sides[0].items() <= sides[1].items()


def test_prompts_that_become_equal_by_truncation_are_kept_out_of_train(plain_model, tmp_path):
    rows = [row | {"prompt": "x" * n + "the same end"} for n, row in enumerate(pair_rows(40))]
    write_jsonl(tmp_path / "in" / "pairs.jsonl", rows)
    params = file_params(
        tmp_path / "in", sft={"source": "none"}, max_tokens=60, max_prompt_tokens=15, long_prompts="truncate_left"
    )
    summary = prepare_into(tmp_path / "out", params, plain_model)
    pairs = read_pairs(tmp_path / "out" / "pairs")
    train, test = (set(pairs.filter(pl.col("split") == side)["prompt_key"]) for side in ("train", "test"))
    assert train and test and train.isdisjoint(test)
    assert summary["train_prompts_also_in_test"] == 1  # xxx and the end
    assert summary["truncated_prompts"] == 1


def test_given_test_pairs_are_the_test_side_and_leave_train(folder, tmp_path):
    write_jsonl(folder / "test.jsonl", pair_rows(10, start=15))
    params = file_params(folder, files={"pairs": ["pairs.jsonl"], "test_pairs": ["test.jsonl"]})
    summary = prepare_into(tmp_path / "out", params)
    assert summary["pairs"] == {"train": 15, "test": 10}
    assert summary["train_prompts_also_in_test"] == 5
    pairs = read_pairs(tmp_path / "out" / "pairs", "test")
    assert pairs["source"].to_list() == [f"test.jsonl:{n}" for n in range(1, 11)]


# what the reference depends on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sft", [{"source": "files", "files": ["sft.jsonl"]}, {"source": "pairs", "pairs_share": 0.6}])
def test_new_pairs_change_neither_the_sft_rows_nor_the_tokenizer(folder, tmp_path, sft):
    prepare_into(tmp_path / "before", file_params(folder, sft=sft))
    write_jsonl(folder / "more.jsonl", [*pair_rows(5, start=100), *pair_rows(5)])
    files = {"pairs": ["pairs.jsonl", "more.jsonl"]}
    summary = prepare_into(tmp_path / "after", file_params(folder, sft=sft, files=files))
    before, after = digests(tmp_path / "before"), digests(tmp_path / "after")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"pairs/pairs.parquet", "pairs/responses.parquet", "summary.json"}
    assert summary["duplicate_pairs"] == 5
    old, new = (read_responses(tmp_path / name / "pairs")["response_key"] for name in ("before", "after"))
    assert set(old) < set(new) and len(new) - len(old) == 10


def test_sft_rows_from_pairs_are_distinct_chosen_responses_of_training_prompts(tmp_path):
    rows = [*pair_rows(60), *[row | {"rejected": "No."} for row in pair_rows(60)]]
    write_jsonl(tmp_path / "in" / "pairs.jsonl", rows)
    prepare_into(tmp_path / "all", file_params(tmp_path / "in", sft={"source": "pairs"}))
    prepare_into(tmp_path / "half", file_params(tmp_path / "in", sft={"source": "pairs", "pairs_share": 0.5}))
    train = set(read_pairs(tmp_path / "all" / "pairs", "train")["prompt_text"])
    sft = read_sft(tmp_path / "all" / "sft.parquet")
    assert set(sft["prompt_text"]) == train and len(sft) == len(train)
    half = set(read_sft(tmp_path / "half" / "sft.parquet")["prompt_text"])
    assert half < train and 0.25 < len(half) / len(train) < 0.75


def test_sft_rows_may_come_from_a_later_pair_file(folder, tmp_path):
    write_jsonl(folder / "more.jsonl", pair_rows(5, start=100))
    files = {"pairs": ["pairs.jsonl", "more.jsonl"]}
    sft = {"source": "pairs", "pairs_files": ["more.jsonl"]}
    prepare_into(tmp_path / "out", file_params(folder, files=files, sft=sft, test_share=0))
    texts = read_sft(tmp_path / "out" / "sft.parquet")["prompt_text"]
    assert set(texts) == {row["prompt"] for row in pair_rows(5, start=100)}


def test_without_sft_rows_the_table_is_empty_and_readable(folder, tmp_path, plain_model):
    summary = prepare_into(tmp_path / "out", file_params(folder, sft={"source": "none"}), plain_model)
    sft = read_sft(tmp_path / "out" / "sft.parquet")
    assert (len(sft), sft.columns) == (0, SFT_SCHEMA.names)
    assert summary["sft_rows"] == 0


def test_a_from_scratch_tokenizer_needs_sft_rows(folder, tmp_path):
    with pytest.raises(RequestError, match=r"model\.scratch trains its tokenizer on the sft rows"):
        prepare_into(tmp_path / "out", file_params(folder, sft={"source": "none"}))


# limits, duplicates, rewards ------------------------------------------------------------------------------------------


def test_every_effect_of_the_limits_is_counted(tmp_path, plain_model):
    rows = [
        {"prompt": "short", "chosen": "fits", "rejected": "also fits"},
        {"prompt": "short", "chosen": "fits", "rejected": "is far too long for it"},
        {"prompt": "far too long", "chosen": "a", "rejected": "b"},
        {"prompt": "far too long", "chosen": "a", "rejected": "c"},
        {"prompt": "much too long", "chosen": "a", "rejected": "b"},
    ]
    write_jsonl(tmp_path / "in" / "pairs.jsonl", rows)
    limits = {"max_tokens": 20, "max_prompt_tokens": 10, "test_share": 0.0, "sft": {"source": "none"}}
    summary = prepare_into(tmp_path / "drop", file_params(tmp_path / "in", **limits), plain_model)
    assert summary["pairs"]["train"] == 2 and summary["truncated_responses"] == 1
    assert summary["dropped_prompts_too_long"] == 2 and summary["dropped_pairs_prompt_too_long"] == 3
    assert (summary["tokens"]["longest_sequence"], summary["tokens"]["longest_response"]) == (20, 15)
    responses = read_responses(tmp_path / "drop" / "pairs").filter(pl.col("truncated"))
    assert responses["response_text"].to_list() == ["is far too long for it"]
    assert responses["response_ids"].list.len().to_list() == [15]

    params = file_params(tmp_path / "in", **limits, long_prompts="truncate_left")
    summary = prepare_into(tmp_path / "cut", params, plain_model)
    assert summary["dropped_prompts_too_long"] == 0
    assert summary["truncated_prompts"] == 2
    assert summary["prompts"]["train"] == 3


def test_a_pair_given_twice_is_kept_once_and_the_reverse_pair_is_another(folder, tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    write_jsonl(folder / "pairs.jsonl", [row, row, row | {"chosen": "b", "rejected": "a"}])
    summary = prepare_into(tmp_path / "out", file_params(folder, test_share=0))
    assert (summary["duplicate_pairs"], summary["pairs"]["train"], summary["distinct_responses"]) == (1, 2, 2)
    assert read_pairs(tmp_path / "out" / "pairs")["source"].to_list() == ["pairs.jsonl:1", "pairs.jsonl:3"]


def test_a_reward_known_from_one_pair_serves_the_response(folder, tmp_path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "c", "chosen_reward": 2, "rejected_reward": 0.5},
    ]
    write_jsonl(folder / "pairs.jsonl", rows)
    prepare_into(tmp_path / "out", file_params(folder, test_share=0))
    responses = read_responses(tmp_path / "out" / "pairs")
    assert dict(zip(responses["response_text"], responses["reward"], strict=True)) == {"a": 2.0, "b": None, "c": 0.5}


# templates and models -------------------------------------------------------------------------------------------------


def test_a_template_file_is_used_and_kept_with_the_tokenizer(folder, tmp_path, plain_model):
    (tmp_path / "chat.jinja").write_text(chat_tokenizers.COLONS)
    params = file_params(folder, sft={"source": "none"}, chat_template=str(tmp_path / "chat.jinja"))
    prepare_into(tmp_path / "out", params, plain_model)
    assert (tmp_path / "out" / "tokenizer" / "chat_template.jinja").read_text() == chat_tokenizers.COLONS
    prompt_ids = read_responses(tmp_path / "out" / "pairs")["prompt_ids"][0]
    prompt = chat_tokenizers.plain().decode(prompt_ids)
    assert prompt.startswith("user: What follows ") and prompt.endswith("?\nassistant: ")


def test_a_chat_model_can_be_used_without_its_template(folder, tmp_path):
    chat_tokenizers.chatml().save_pretrained(tmp_path / "model")
    model = ModelParams(name=str(tmp_path / "model"))
    write_jsonl(folder / "pairs.jsonl", [{"prompt": "ab", "chosen": "c", "rejected": "d"}])
    lengths = {}
    for choice in ("auto", "never"):
        params = file_params(folder, sft={"source": "none"}, chat_template=choice, test_share=0)
        prepare_into(tmp_path / choice, params, model)
        lengths[choice] = len(read_responses(tmp_path / choice / "pairs")["prompt_ids"][0])
    assert lengths["never"] == 2 < lengths["auto"]


def test_a_from_scratch_model_can_be_trained_on_plain_text(folder, tmp_path):
    prepare_into(tmp_path / "out", file_params(folder, chat_template="never"))
    row = read_responses(tmp_path / "out" / "pairs").row(0, named=True)
    assert row["response_ids"][-1] == 1 and not set(row["prompt_ids"]) & {0, 1, 2, 3, 4}  # no special token but the end


def test_bad_rows_are_reported_before_what_follows_from_them(tmp_path, plain_model):
    """Other column names leave no pair, hence no sft row: the columns are the cause."""
    write_jsonl(tmp_path / "in" / "pairs.jsonl", [{"question": "Say hi", "better": "Hi", "worse": "No"}])
    for model in (plain_model, ModelParams.model_validate({"scratch": {}})):
        with pytest.raises(
            RequestError, match=r"pairs\.jsonl:1: no column 'chosen' or 'rejected' \(found 'question', 'better'"
        ):
            prepare_into(tmp_path / "out", file_params(tmp_path / "in", sft={"source": "pairs"}), model)


def test_a_pattern_reads_all_its_files(tmp_path, plain_model):
    write_jsonl(tmp_path / "in" / "a.jsonl", pair_rows(12))
    (tmp_path / "in" / "b.json").write_text(json.dumps(pair_rows(20)[12:]))
    both = file_params(tmp_path / "in", files={"pairs": ["*.json*"]}, sft={"source": "none"})
    write_jsonl(tmp_path / "whole" / "pairs.jsonl", pair_rows(20))
    one = file_params(tmp_path / "whole", sft={"source": "none"})
    keys = []
    for name, params in (("both", both), ("one", one)):
        prepare_into(tmp_path / name, params, plain_model)
        keys.append(read_pairs(tmp_path / name / "pairs").select("chosen_key", "rejected_key", "split").rows())
    assert keys[0] == keys[1] and len(keys[0]) > 10
