"""What reaches the engine: order, calls, lengths, and what is refused before it starts."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import prompt_key, response_key
from pipeline.engine.rows import calls, engine_length, engine_rows, longest_row, scoring_order
from pipeline.errors import RequestError
from pipeline.model.limits import ModelLimits, bad_rows, check_rows, model_limits
from pipeline.params import ScoreParams
from tests.tiny import TINY_MODEL

LIMITS = ModelLimits(vocabulary=64, positions=16)
MODEL = Path("models/{reference}")  # braces, as a path may have them


def key_of(prompt, response):
    # No key exists for a negative id; a damaged file may still hold the row under some key.
    return response_key(prompt, response) if min([*prompt, *response]) >= 0 else b"damaged row here"


def frame(rows):
    """rows: (prompt ids, response ids)."""
    return pl.DataFrame(
        {
            "response_key": [key_of(p, r) for p, r in rows],
            "prompt_key": [prompt_key(p) for p, _ in rows],
            "prompt_ids": [p for p, _ in rows],
            "response_ids": [r for _, r in rows],
        },
        schema={
            "response_key": pl.Binary,
            "prompt_key": pl.Binary,
            "prompt_ids": pl.List(pl.Int32),
            "response_ids": pl.List(pl.Int32),
        },
    )


GOOD = ([3, 4], [5, 63])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (([], [5]), "no prompt token"),
        (([3], []), "no response token"),
        (([3], [64]), "token id 64, but models/{reference} has 64 embeddings"),
        (([99], [3]), "token id 99"),
        (([3], [4, -1]), "token id -1"),
        (([3] * 10, [4] * 7), "17 tokens with its prompt, but models/{reference} has 16 positions"),
    ],
)
def test_a_row_that_the_model_cannot_take_is_refused_by_key(bad, says):
    with pytest.raises(RequestError) as refused:
        check_rows(frame([GOOD, bad, GOOD]), LIMITS, MODEL)
    assert key_of(*bad).hex() in str(refused.value)
    assert says in str(refused.value)


def test_rows_at_the_limits_are_taken():
    check_rows(frame([GOOD, ([0], [63]), ([3] * 15, [4]), ([3], [4] * 15)]), LIMITS, MODEL)
    check_rows(frame([([3] * 100, [4])]), ModelLimits(64, None), MODEL)


def test_every_bad_row_is_counted():
    with pytest.raises(RequestError, match="2 more rows can't be scored"):
        check_rows(frame([([3], [64]), ([3], [65]), ([3], [])]), LIMITS, MODEL)


def test_each_bad_row_is_found_once_with_its_own_numbers():
    rows = [([3], [64]), GOOD, ([3] * 10, [99] * 7), ([3] * 20, [4])]
    found = {row.key: row.problem for row in bad_rows(frame(rows), LIMITS, MODEL)}
    assert set(found) == {key_of(*rows[0]), key_of(*rows[2]), key_of(*rows[3])}
    assert "token id 64" in found[key_of(*rows[0])]
    assert "token id 99" in found[key_of(*rows[2])]  # too long as well, but the tokenizer is the deeper cause
    assert "21 tokens" in found[key_of(*rows[3])]


def test_max_model_len_has_room_for_the_token_that_vllm_must_sample():
    assert engine_length(9, LIMITS, ScoreParams(), what="rows") == (10, False)


def test_a_row_may_fill_the_models_positions():
    assert engine_length(16, LIMITS, ScoreParams(), what="rows") == (17, True)


def test_too_small_max_model_len_is_refused_with_the_value_needed():
    with pytest.raises(RequestError, match=r"score.max_model_len is 9.*Set it to 10"):
        engine_length(9, LIMITS, ScoreParams(max_model_len=9), what="rows")


def test_max_model_len_beyond_the_positions_is_refused():
    with pytest.raises(RequestError, match=r"score.max_model_len is 18.*16 positions"):
        engine_length(9, LIMITS, ScoreParams(max_model_len=18), what="rows")


def test_limits_come_from_the_config(tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model("qwen2", vocab_size=64, **TINY_MODEL).save_pretrained(tmp_path)
    assert model_limits(tmp_path)[:2] == (64, TINY_MODEL["max_position_embeddings"])


def test_a_folder_without_config_is_a_wrong_request(tmp_path):
    with pytest.raises(RequestError, match="transformers folder"):
        model_limits(tmp_path)


tokens = st.lists(st.integers(0, 63), min_size=1, max_size=6)
row_sets = st.lists(st.tuples(st.sampled_from([[1], [2], [3, 3], [4, 4, 4]]), tokens), min_size=1, max_size=40)


def cut(rows, rows_per_call):
    return [call["response_key"].to_list() for call in calls(rows, rows_per_call)]


@pytest.mark.slow
@given(row_sets, st.integers(1, 9))
def test_calls_are_bounded_and_cover_every_row_once(rows, rows_per_call):
    ordered = scoring_order(frame(rows).unique("response_key"))
    found = cut(ordered, rows_per_call)
    assert max(map(len, found)) <= rows_per_call
    assert [key for call in found for key in call] == ordered["response_key"].to_list()


@pytest.mark.slow
@given(row_sets, st.integers(1, 9))
def test_a_prompt_is_split_only_if_it_fills_a_call_alone(rows, rows_per_call):
    ordered = scoring_order(frame(rows).unique("response_key"))
    found = [call["prompt_key"].to_list() for call in calls(ordered, rows_per_call)]
    for before, after in pairwise(found):
        if before[-1] == after[0]:
            assert set(before) == {before[-1]} and len(before) == rows_per_call


@pytest.mark.slow
@given(row_sets, st.integers(1, 9), st.data())
def test_a_restart_makes_the_very_calls_that_were_left(rows, rows_per_call, data):
    ordered = scoring_order(frame(rows).unique("response_key"))
    planned = cut(ordered, rows_per_call)
    done = data.draw(st.integers(0, len(planned)))
    finished = [key for call in planned[:done] for key in call]
    left = ordered.filter(~pl.col("response_key").is_in(finished))
    assert cut(left, rows_per_call) == planned[done:]


@pytest.mark.slow
@given(row_sets, st.randoms())
def test_order_does_not_depend_on_the_order_of_the_file(rows, random):
    table = frame(rows).unique("response_key", maintain_order=True)
    shuffled = table[random.sample(range(len(table)), len(table))]
    assert scoring_order(shuffled).equals(scoring_order(table))


def test_the_longest_prompt_group_comes_first():
    ordered = scoring_order(frame([([1], [5]), ([2], [5] * 9), ([2], [6]), ([3], [5] * 4)]))
    assert ordered["response_ids"].list.len().to_list() == [9, 1, 4, 1]
    assert longest_row(ordered) == 10


def test_engine_rows_keep_the_order_and_the_ids():
    rows = [([1, 2], [3]), ([4], [5, 6, 7])]
    found = [(prompt.tolist(), response.tolist()) for prompt, response in engine_rows(frame(rows))]
    assert found == rows
    assert all(part.dtype == np.int32 for row in engine_rows(frame(rows)) for part in row)
    assert engine_rows(frame([])) == []
