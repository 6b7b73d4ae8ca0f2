"""Picking a response's log-probs out of vLLM's answer."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.engine.answers import response_logps


def answer(*per_token):
    """per_token: for every token of prompt and response, its entries as (id, logp); the first has none."""
    ends = np.cumsum([len(entries) for entries in per_token]).tolist()
    return SimpleNamespace(
        start_indices=[0, *ends[:-1]],
        end_indices=ends,
        token_ids=[id for entries in per_token for id, _ in entries],
        logprobs=[logp for entries in per_token for _, logp in entries],
    )


WHOLE = answer([], [(11, -1.0)], [(12, -2.0)], [(13, -3.0)], [(14, -4.0)])  # prompt 10 11, response 12 13 14


def test_response_tokens_get_the_last_log_probs():
    assert response_logps(WHOLE, np.array([12, 13, 14])).tolist() == [-2.0, -3.0, -4.0]
    assert response_logps(WHOLE, np.array([14])).tolist() == [-4.0]


def test_a_response_may_begin_right_after_a_one_token_prompt():
    assert response_logps(WHOLE, np.array([11, 12, 13, 14])).tolist() == [-1.0, -2.0, -3.0, -4.0]


def test_an_answer_that_leaves_out_cached_prompt_tokens_is_read_from_its_end():
    assert response_logps(answer([(13, -3.0)], [(14, -4.0)]), np.array([13, 14])).tolist() == [-3.0, -4.0]


def test_alternatives_beside_the_token_are_passed_over():
    flat = answer([], [(9, -0.1), (12, -2.0)], [(13, -3.0)], [(8, -0.2), (14, -4.0)])
    assert response_logps(flat, np.array([12, 13, 14])).tolist() == [-2.0, -3.0, -4.0]


@pytest.mark.parametrize("response", [[11, 12, 13], [13, 14, 15], [12, 13, 99], [12, 14, 13]])
def test_an_answer_about_other_tokens_is_refused(response):
    with pytest.raises(ValueError, match="log-probs for"):
        response_logps(WHOLE, np.array(response))


def test_an_answer_without_entries_for_the_response_is_refused():
    with pytest.raises(ValueError, match="0 of 2"):
        response_logps(answer([], [], []), np.array([1, 2]))
