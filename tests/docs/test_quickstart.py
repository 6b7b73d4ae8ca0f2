"""The quickstart, as far as it needs no engine: its Python and its parameters, on a small demo in its own folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from cache import logps_table, publish_reference
from stages.__main__ import main
from tests import ROOT
from tests.cache.rows import identity
from tests.docs import blocks

PAGE = ROOT / "docs/quickstart.md"
LOOK, WRITE = (block.text for block in blocks("python") if block.page == PAGE)


def prepare(*overrides: str) -> dict:
    places = {"--sft": "sft.parquet", "--tokenizer": "tokenizer", "--pairs": "pairs", "--summary": "summary.json"}
    options = [word for name, place in places.items() for word in (name, f"data/prepared/{place}")]
    done = CliRunner().invoke(main, ["prepare", *options, *(word for pair in overrides for word in ("--set", pair))])
    assert done.exit_code == 0, done.output
    return json.loads(Path("data/prepared/summary.json").read_text())


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Prepared pairs, and a cache whose log-probs get lower from row to row."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "data/input").mkdir(parents=True)
    prepare("prepare.demo={prompts: 60, sft_rows: 200, seed: 0}")
    responses = pl.read_parquet("data/prepared/pairs/responses.parquet")
    rows = logps_table(
        response_keys=responses["response_key"].to_list(),
        prompt_keys=responses["prompt_key"].to_list(),
        n_prompt_tokens=responses["prompt_ids"].list.len().to_list(),
        token_ids=responses["response_ids"].to_list(),
        token_logps=[np.full(len(ids), -0.01 * i) for i, ids in enumerate(responses["response_ids"])],
    )
    publish_reference(Path("data/reference/logps"), rows, identity())
    return responses


def test_the_least_likely_responses_are_shown_with_their_texts(demo, capsys):
    names: dict = {}
    exec(LOOK, names)
    shown = names["ranked"].collect()
    assert shown["response_text"].to_list() == demo["response_text"].to_list()[::-1]
    assert f"{demo['response_text'][-1][:8]}" in capsys.readouterr().out


def test_the_rows_that_it_writes_are_read_with_the_parameters_that_it_shows(demo):
    exec(WRITE, {})
    shown = [YAML(typ="safe").load(block.text) for block in blocks("yaml") if block.page == PAGE]
    own = next(block["prepare"] for block in shown if block.get("prepare", {}).get("source") == "files")
    summary = prepare(*(f"prepare.{key}={json.dumps(value)}" for key, value in own.items()))
    assert sum(summary["pairs"].values()) == 101 and summary["skipped_rows"]["count"] == 0
    texts = pl.read_parquet("data/prepared/pairs/pairs.parquet")
    assert texts.filter(prompt_text="Compute 2 + 2.").select("chosen_text", "rejected_text").rows() == [("4", "5")]
