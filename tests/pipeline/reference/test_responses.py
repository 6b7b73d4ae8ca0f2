"""Rows in the order of scoring and of sketching by an external sort: what an in-memory sort of the same table gives."""

import shutil
from itertools import count

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache import KeySet, response_key
from pipeline.data.tables import find_sources, read_pairs, read_responses
from pipeline.engine.rows import ROW_COLUMNS, SKETCHED, calls, scoring_order
from pipeline.model.limits import ModelLimits, bad_rows
from pipeline.reference import order
from pipeline.reference.responses import Responses, Wanted, first_of_each, set_bad_aside
from pipeline.tokens.view import open_token_view
from tests.scoring_project import write_prepared

sequences = st.lists(st.integers(0, 63), min_size=1, max_size=6)
row_sets = st.lists(st.tuples(st.sampled_from([[1], [2], [3, 3], [4, 4, 4], [5, 5, 5]]), sequences), max_size=60)
SEVERAL = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Responses of so many folders of rows, and their tables; chunks, slabs and buckets are of a few rows each."""
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(order, "CHUNK_ROWS", 7)
    monkeypatch.setattr(order, "SLAB_ROWS", 5)
    monkeypatch.setattr(order, "CODE_BITS", 5)
    numbers = count()

    def call(*row_sets):
        folders = [tmp_path / f"pairs-{next(numbers)}" for _ in row_sets]
        for folder, rows in zip(folders, row_sets, strict=True):
            write_prepared(folder, list({response_key(*row): row for row in rows}.values()))
        responses = Responses([open_token_view(folder) for folder in folders], tmp_path / f"scratch-{next(numbers)}")
        return responses, pl.concat([read_responses(folder) for folder in folders])

    yield call
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@SEVERAL
@given(rows=row_sets, rows_per_call=st.integers(1, 9), data=st.data())
def test_calls_are_those_of_an_in_memory_sort(opened, rows, rows_per_call, data):
    responses, table = opened(rows)
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(table), max_size=len(table))), bool)
    found = list(Wanted(responses, chosen, sketched=responses.train).calls(rows_per_call))
    marked = table.select(*ROW_COLUMNS, (pl.col("split") == "train").alias(SKETCHED), pl.Series("chosen", chosen))
    wanted = list(calls(scoring_order(marked).filter("chosen").drop("chosen"), rows_per_call))
    assert len(found) == len(wanted) and all(a.equals(b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.slow
@SEVERAL
@given(rows=row_sets, data=st.data())
def test_the_longest_row_of_a_prompt_may_be_looked_for_among_some_rows_only(opened, rows, data):
    responses, table = opened(rows)
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(table), max_size=len(table))), bool)
    found = list(Wanted(responses, chosen, among=chosen).calls(4))
    wanted = list(calls(scoring_order(table.filter(pl.Series(chosen, dtype=pl.Boolean)).select(ROW_COLUMNS)), 4))
    assert [call["response_key"].to_list() for call in found] == [call["response_key"].to_list() for call in wanted]


@pytest.mark.slow
@SEVERAL
@given(st.lists(row_sets, min_size=2, max_size=3))
def test_several_folders_are_ordered_as_one_table_of_their_distinct_rows(opened, folders):
    responses, table = opened(*folders)
    chosen = first_of_each(responses.table.keys) if len(table) else np.zeros(0, bool)
    table = table.unique("response_key", keep="first", maintain_order=True).select(ROW_COLUMNS)
    assert responses.response_tokens >= int(table["response_ids"].list.len().sum())
    found = list(Wanted(responses, chosen).calls(4))
    wanted = list(calls(scoring_order(table), 4))
    assert [call.drop(SKETCHED).rows() for call in found] == [call.rows() for call in wanted]


@pytest.mark.slow
@SEVERAL
@given(row_sets, st.integers(1, 40))
def test_batches_come_longest_first_with_padding_within_their_tokens(opened, rows, batch_tokens):
    responses, table = opened(rows)
    length = pl.col("prompt_ids").list.len() + pl.col("response_ids").list.len()
    ordered = table.with_columns(length.alias("length")).sort("length", "response_key", descending=[True, False])
    left = ordered["response_key"].to_list()
    longest = dict(zip(left, ordered["length"], strict=True))
    for batch in Wanted(responses, responses.all).batches(batch_tokens):
        assert batch["response_key"].to_list() == left[: len(batch)]
        assert len(batch) == 1 or longest[left[0]] * len(batch) <= batch_tokens
        left = left[len(batch) :]
        assert not left or longest[batch["response_key"][0]] * (len(batch) + 1) > batch_tokens  # no row more would fit
    assert not left


def test_bad_rows_are_those_of_the_whole_table_and_all_others_stay(opened):
    rows = [([1], [n] * (1 + n % 20)) for n in range(80)] + [([70], [1]), ([1, 2], [])]
    responses, table = opened(rows, [([3] * 9, [4] * 9), ([3], [99])])
    limits = ModelLimits(vocabulary=64, positions=16)
    (left,), bad = set_bad_aside([Wanted(responses, responses.all)], limits, "model")
    assert list(bad) == list(bad_rows(table, limits, "model")) and 20 < len(bad) < 60
    kept = pl.concat(left.frames(10))["response_key"].to_list()
    assert kept == [key for key in table["response_key"] if key not in {row.key for row in bad}]
    assert left.longest == max(len(p) + len(r) for p, r in table.select("prompt_ids", "response_ids").rows() if r) - 5
    roomy = ModelLimits(vocabulary=128, positions=None)
    (left,), bad = set_bad_aside([Wanted(responses, responses.all)], roomy, "model")
    assert [row.problem for row in bad] == ["has no response token, so there is nothing to score"]


def test_counts_and_keys_are_those_of_the_chosen_rows(opened):
    rows = [([1] * (n % 3 + 1), [n]) for n in range(50)]
    responses, table = opened(rows)
    chosen = np.arange(50) % 4 == 1
    wanted, some = Wanted(responses, chosen), table.filter(pl.Series(chosen))
    assert (len(wanted), wanted.longest) == (len(some), 4)
    assert wanted.tokens == sum(len(p) + 1 for p in some["prompt_ids"])
    assert responses.key_set(chosen) == KeySet(some["response_key"])
    assert responses.key_set() == KeySet(table["response_key"])
    known = KeySet(some["response_key"][:5])
    assert np.flatnonzero(responses.without(chosen, known)).tolist() == np.flatnonzero(chosen)[5:].tolist()
    assert responses.among(known).sum() == 5 and responses.frame(np.array([7, 3]))["response_ids"].to_list() == [
        [7],
        [3],
    ]


def test_lines_of_the_input_are_found_for_the_keys_asked_and_no_others(tmp_path):
    write_prepared(tmp_path, [([1], [n]) for n in range(6)])
    pairs = read_pairs(tmp_path)
    key = pairs["rejected_key"][1]
    assert find_sources(tmp_path, [key, b"x" * 16]) == {key: ["rows:1", "rows:2"]}
