"""Published preference data, where it lies beside the checkout; REFCACHE_TEST_DATA names another place."""

import os
from pathlib import Path

import polars as pl
import pytest

from pipeline.data.tables import read_pairs, read_responses, read_sft
from pipeline.errors import RequestError
from pipeline.params import ModelParams
from tests import ROOT
from tests.pipeline.data import chat_tokenizers
from tests.pipeline.data.preparing import file_params, prepare_into

pytestmark = pytest.mark.slow

DATA = Path(os.environ.get("REFCACHE_TEST_DATA", ROOT / "../shared/data"))
MODEL = ModelParams.model_validate({"scratch": {"vocabulary_size": 1024}})


def data_folder(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"no {name} data under {DATA}; set REFCACHE_TEST_DATA")
    return DATA / name


@pytest.mark.slow
def test_solutions_of_school_problems_share_prompts_and_responses(tmp_path):
    files = {"pairs": ["pairs-train.jsonl"], "test_pairs": ["pairs-test.jsonl"]}
    sft = {"source": "files", "files": ["sft-train.jsonl"]}
    summary = prepare_into(tmp_path, file_params(data_folder("gsm8k"), files=files, sft=sft), MODEL)
    assert summary["pairs"] == {"train": 3431, "test": 654}
    assert summary["sft_rows"] == len(read_sft(tmp_path / "sft.parquet")) == 7473
    pairs, responses = read_pairs(tmp_path / "pairs"), read_responses(tmp_path / "pairs")
    assert len(responses) < 0.6 * 2 * len(pairs)
    assert pairs.group_by("prompt_key").agg(pl.col("split").n_unique())["split"].max() == 1
    assert responses.filter(~pl.col("truncated"))["response_ids"].list.last().unique().to_list() == [1]  # the end token


def test_instructions_of_all_kinds_have_bad_rows_that_are_found(tmp_path_factory, tmp_path):
    model_folder = tmp_path_factory.mktemp("bytes")
    chat_tokenizers.chatml().save_pretrained(model_folder)
    model = ModelParams(name=str(model_folder))
    params = file_params(
        data_folder("ultrafeedback"),
        files={"pairs": ["pairs-train.jsonl"]},
        sft={"source": "none"},
        max_tokens=4096,  # of bytes
        max_prompt_tokens=2048,
    )
    summary = prepare_into(tmp_path, params, model, on_bad_row="skip")
    skipped = summary["skipped_rows"]
    assert skipped["count"] == 6
    assert {"where": "pairs-train.jsonl:479", "reason": "rejected is empty"} in skipped["examples"]
    assert sum(summary["pairs"].values()) + summary["dropped_pairs_prompt_too_long"] == 994
    assert summary["tokens"]["longest_sequence"] == 4096


REFUSED = {
    "06-roles.jsonl": r"06-roles\.jsonl:3: the chat template renders nothing of turn 1, whose role is 'developer'",
    "26-implicit-text.jsonl": "prepare.chat_template: never",
    "40-hidden-cause.jsonl": r"no column 'chosen' or 'rejected' \(found 'question', 'better', 'worse'\)",
}


def test_made_up_files_in_published_schemas_are_read_or_say_why_not(tmp_path):
    folder = data_folder("schemas")
    template = (folder / "qwenlike.jinja").read_text()
    chat_tokenizers.byte_tokenizer(["<|end|>"], eos="<|end|>", template=template).save_pretrained(tmp_path / "model")
    model = ModelParams(name=str(tmp_path / "model"))
    files = sorted(path.name for path in folder.iterdir() if path.name[:2].isdigit() and path.is_file())
    assert len(files) >= 25
    for name in files:
        params = file_params(folder, files={"pairs": [name]}, sft={"source": "none"}, test_share=0.0)
        if name in REFUSED:
            with pytest.raises(RequestError, match=REFUSED[name]):
                prepare_into(tmp_path / "out", params, model)
        else:
            summary = prepare_into(tmp_path / "out", params, model)
            assert summary["pairs"]["train"] + summary["feedback"]["train"] > 0, name
