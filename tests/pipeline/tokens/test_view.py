"""Mapped token ids say what responses.parquet says, whatever its order, and are never stale or torn."""

import numpy as np
import polars as pl
import pytest

from cache import derived, key_bytes
from cache.errors import CacheError
from pipeline.data.tables import RESPONSES_SCHEMA, read_responses, write_table
from pipeline.errors import RequestError, RunFailed
from pipeline.tokens import layout
from pipeline.tokens.view import TokenView, open_token_view
from pipeline.workspace import scratch_folder, views_folder
from tests.tiny import write_pairs

PROMPTS = 40


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(layout, "BLOCK_ROWS", 16)


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs", PROMPTS)


def rewrite(folder, rows):
    write_table(rows.to_arrow().cast(RESPONSES_SCHEMA), folder / "responses.parquet", RESPONSES_SCHEMA)


def require_equal(view, table):
    assert key_bytes(view.keys) == table["response_key"].to_list()
    assert view.train.tolist() == (table["split"] == "train").to_list()
    prompt_keys = table["prompt_key"].to_list()
    assert key_bytes(view.prompt_keys) == list(dict.fromkeys(prompt_keys))
    assert [key_bytes(view.prompt_keys)[number] for number in view.prompt_numbers] == prompt_keys
    assert view.response_lengths.tolist() == table["response_ids"].list.len().to_list()
    assert view.prompt_lengths.tolist() == table["prompt_ids"].list.len().to_list()
    for row, (prompt, response) in enumerate(table.select("prompt_ids", "response_ids").iter_rows()):
        assert view.prompt_ids(row).tolist() == prompt and view.response_ids(row).tolist() == response


@pytest.mark.parametrize("order", ["by key", "by prompt", "shuffled"])
def test_a_view_holds_what_the_table_holds_in_its_order(pairs, order):
    table = read_responses(pairs)
    if order != "by key":
        table = table.sort("prompt_key") if order == "by prompt" else table.sample(fraction=1, shuffle=True, seed=0)
        rewrite(pairs, table)
    view = open_token_view(pairs)
    require_equal(view, table)
    keys = table["response_key"].to_list()
    asked = [keys[5], bytes(16), keys[0], keys[5], keys[-1], b"\xff" * 16]
    assert view.rows_of(asked).tolist() == [5, -1, 0, 5, len(keys) - 1, -1]


def test_each_prompt_lies_there_once(pairs):
    view, table = open_token_view(pairs), read_responses(pairs)
    once = table.unique("prompt_key")["prompt_ids"].list.len().sum()
    assert len(view.prompt_keys) == PROMPTS < len(view)
    assert (view.path / "prompt_ids").stat().st_size == 4 * once


def test_rows_come_in_the_order_asked_without_a_copy(pairs):
    view, table = open_token_view(pairs), read_responses(pairs)
    rows = np.array([9, 2, 9, 0])
    found = view.gather(rows)
    assert [ids.tolist() for ids in found.prompts] == [table["prompt_ids"][int(row)].to_list() for row in rows]
    assert [ids.tolist() for ids in found.responses] == [table["response_ids"][int(row)].to_list() for row in rows]
    for array in (*found.prompts, *found.responses, view.keys, view.prompt_keys, view.train, view.prompt_numbers):
        assert not array.flags.writeable
    assert np.shares_memory(found.responses[0], found.responses[2])
    assert np.shares_memory(found.responses[0], view.response_ids(9))


def test_a_table_without_rows_has_an_empty_view(pairs):
    rewrite(pairs, read_responses(pairs).clear())
    view = open_token_view(pairs)
    assert len(view) == len(view.prompt_keys) == len(view.response_lengths) == len(view.prompt_lengths) == 0
    assert view.rows_of([bytes(16)]).tolist() == [-1]
    assert view.gather(np.empty(0, np.int64)) == ([], [])


def test_an_empty_prompt_and_an_empty_response_stay_apart_from_their_neighbours(pairs):
    empty = pl.lit([], dtype=pl.List(pl.Int32))
    table = read_responses(pairs).with_columns(
        prompt_ids=pl.when(pl.int_range(pl.len()) % 3 == 0).then(empty).otherwise("prompt_ids"),
        response_ids=pl.when(pl.int_range(pl.len()) % 4 == 0).then(empty).otherwise("response_ids"),
        prompt_key=pl.col("response_key"),  # every response under a prompt of its own
    )
    rewrite(pairs, table)
    require_equal(open_token_view(pairs), table)


def test_another_table_has_another_view_and_the_same_one_is_not_built_again(pairs, monkeypatch):
    first = open_token_view(pairs)
    rewrite(pairs, read_responses(pairs).head(10))
    second = open_token_view(pairs)
    assert first.path != second.path and len(second) == 10 and len(first) == 3 * PROMPTS
    monkeypatch.setattr("pipeline.tokens.view.write_view", None)
    assert open_token_view(pairs).path == second.path
    assert not any(scratch_folder().iterdir())


@pytest.mark.parametrize("name", [*layout.FILES, derived.SIZES])
def test_a_torn_view_is_refused_where_it_is_only_read_and_else_built_anew(pairs, name):
    view = open_token_view(pairs)
    file = view.path / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunFailed, match="not whole"):
        TokenView(view.path)
    require_equal(open_token_view(pairs), read_responses(pairs))


def test_a_view_of_another_layout_is_not_opened(pairs, monkeypatch):
    first = open_token_view(pairs)
    monkeypatch.setattr("pipeline.tokens.view.VIEW_VERSION", layout.VIEW_VERSION + 1)
    assert open_token_view(pairs).path != first.path


def test_without_a_table_the_error_names_the_stage(tmp_path):
    with pytest.raises(RequestError, match="refcache prepare"):
        open_token_view(tmp_path / "nothing")
    assert [path.name for path in views_folder().iterdir()] == ["lock"]


def test_a_refusal_of_the_system_leaves_nothing_behind(pairs, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.tokens.layout._number_prompts", refuse)
    with pytest.raises(CacheError, match="No space left on device"):
        open_token_view(pairs)
    assert [path.name for path in views_folder().iterdir()] == ["lock"]
