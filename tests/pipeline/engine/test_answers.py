"""Completing partial answers: against a naive model of an engine that skips whatever an earlier sequence computed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.answers import complete, prompt_salt


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
