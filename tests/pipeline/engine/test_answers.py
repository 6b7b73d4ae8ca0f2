"""Log-probs out of the engine's answers: which entries are the response's, and how partial answers are completed.

Completing is held against a naive model of an engine that skips whatever an earlier sequence computed.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.answers import complete, prompt_salt, ranked_logps


def true_logps(prompt, response):
    """Any function of the tokens up to and including the answered one."""
    whole = [*prompt, *response]
    return np.array(
        [-(hash(tuple(whole[: len(prompt) + i + 1])) % 1000) / 100 for i in range(len(response))], np.float32
    )


def array(ids):
    return np.array(ids, np.int32)


SMALL = st.integers(0, 1)
GROUPS = st.lists(
    st.tuples(st.lists(SMALL, min_size=1, max_size=6), st.lists(st.lists(SMALL, min_size=1, max_size=8), min_size=1)),
    min_size=1,
    max_size=4,
    unique_by=lambda group: tuple(group[0]),
)


@pytest.mark.slow
@given(groups=GROUPS, block=st.integers(1, 4))
def test_every_completed_answer_is_the_true_one(groups, block):
    rows, tails, seen = [], [], set()
    for prompt, responses in groups:
        for response in responses:
            whole = (*prompt, *response)
            skipped = 0
            while skipped + block < len(whole) and (tuple(prompt), whole[: skipped + block]) in seen:
                skipped += block
            seen |= {(tuple(prompt), whole[:end]) for end in range(block, len(whole) + 1, block)}
            # The state at position `skipped` answers for the token behind it; the one before was never computed.
            first = max(0, skipped + 1 - len(prompt))
            rows.append((array(prompt), array(response)))
            tails.append(true_logps(prompt, response)[first:])
    for (prompt, response), tail, found in zip(rows, tails, complete(rows, tails), strict=True):
        if found is None:
            assert len(tail) < len(response)
        else:
            np.testing.assert_array_equal(found, true_logps(prompt.tolist(), response.tolist()))


def test_a_beginning_comes_from_a_sibling_that_itself_was_completed():
    prompt = array([1])
    rows = [(prompt, array(ids)) for ids in ([5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 9])]
    whole = [true_logps([1], ids.tolist()) for _, ids in rows]
    found = complete(rows, [whole[0], whole[1][3:], whole[2][2:]])
    for expected, logps in zip(whole, found, strict=True):
        np.testing.assert_array_equal(logps, expected)


def test_a_beginning_is_never_taken_from_another_prompt_or_another_beginning():
    rows = [(array([1]), array([5, 6])), (array([1]), array([7, 6])), (array([2]), array([5, 6]))]
    whole = [true_logps(p.tolist(), r.tolist()) for p, r in rows]
    assert complete(rows, [whole[0], whole[1][1:], whole[2][1:]])[1:] == [None, None]


def test_an_answer_without_any_token_is_left_open():
    rows = [(array([1]), array([5]))]
    assert complete(rows, [np.empty(0, np.float32)]) == [None]


def test_salts_differ_between_prompts():
    prompts = [array(ids) for ids in ([1], [1, 1], [1, 0], [0, 1], [256], [1, 0, 0, 0])]
    assert len({prompt_salt(prompt) for prompt in prompts}) == len(prompts)


# which entries of vLLM's flat answer are the response's ---------------------------------------------------------------


def answer(*per_token):
    """per_token: for every token of prompt and response, its entries as (id, logp); the first has none."""
    ends = np.cumsum([len(entries) for entries in per_token]).tolist()
    return SimpleNamespace(
        start_indices=[0, *ends[:-1]],
        end_indices=ends,
        token_ids=[id for entries in per_token for id, _ in entries],
        logprobs=[logp for entries in per_token for _, logp in entries],
        ranks=[place + 2 for entries in per_token for place in range(len(entries))],
    )


def logps(flat, response):
    return ranked_logps(flat, np.array(response))[:, 0].tolist()


WHOLE = answer([], [(11, -1.0)], [(12, -2.0)], [(13, -3.0)], [(14, -4.0)])  # prompt 10 11, response 12 13 14


def test_response_tokens_get_the_last_log_probs():
    assert logps(WHOLE, [12, 13, 14]) == [-2.0, -3.0, -4.0]
    assert logps(WHOLE, [14]) == [-4.0]


def test_a_response_may_begin_right_after_a_one_token_prompt():
    assert logps(WHOLE, [11, 12, 13, 14]) == [-1.0, -2.0, -3.0, -4.0]


def test_an_answer_that_leaves_out_cached_prompt_tokens_is_read_from_its_end():
    assert logps(answer([(13, -3.0)], [(14, -4.0)]), [13, 14]) == [-3.0, -4.0]


def test_alternatives_beside_the_token_are_passed_over():
    flat = answer([], [(9, -0.1), (12, -2.0)], [(13, -3.0)], [(8, -0.2), (14, -4.0)])
    assert ranked_logps(flat, np.array([12, 13, 14])).tolist() == [[-2.0, 3.0], [-3.0, 2.0], [-4.0, 3.0]]


@pytest.mark.parametrize("response", [[11, 12, 13], [13, 14, 15], [12, 13, 99], [12, 14, 13]])
def test_an_answer_about_other_tokens_is_refused(response):
    with pytest.raises(ValueError, match="log-probs for"):
        ranked_logps(WHOLE, np.array(response))


def test_an_answer_without_entries_for_the_response_is_refused():
    with pytest.raises(ValueError, match="0 of 2"):
        ranked_logps(answer([], [], []), np.array([1, 2]))
