"""Pairs of one prompt's answers against the rules read literally: every (i, j) is looked at."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sampled.pairing import choose_pairs

ANSWERS = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from("abcdefgh")), max_size=9)
GAPS = st.sampled_from([0.0, 0.25, 0.3, 1.0])


def choose(scores, texts=None, *, rule="max_min", min_gap=0.0, seed=0):
    return choose_pairs(scores, texts or [f"t{i}" for i in range(len(scores))], rule=rule, min_gap=min_gap, seed=seed)


def test_eight_answers_give_the_best_and_the_worst():
    assert choose([3.0, 5.0, 1.0, 4.0, 5.0, 2.0, 1.0, 3.0]) == [(1, 2)]  # of equals the first


@pytest.mark.parametrize("rule", ["max_min", "best_vs_random", "all"])
def test_nothing_to_prefer_gives_no_pair(rule):
    assert choose([], rule=rule) == []
    assert choose([1.0], rule=rule) == []
    assert choose([1.0, 1.0, 1.0], rule=rule) == []
    assert choose([0.0, 0.5], rule=rule, min_gap=0.5) == []  # no further apart than the gap
    assert choose([0.0, 0.75], rule=rule, min_gap=0.5) == [(1, 0)]
    assert choose([0.0, 1.0], ["same", "same"], rule=rule) == []


def test_equal_texts_count_once_at_the_first():
    scores, texts = [0.5, 0.0, 1.0, 0.25], ["a", "b", "b", "c"]  # the second b's 1.0 is not looked at
    assert choose(scores, texts) == [(0, 1)]
    assert choose(scores, texts, rule="all") == [(0, 1), (0, 3), (3, 1)]


def test_the_random_rule_draws_every_worse_answer_and_repeats_itself():
    scores = [0.9, 1.0, 0.2, 0.1]
    found = [choose(scores, rule="best_vs_random", min_gap=0.5, seed=seed) for seed in range(60)]
    assert found == [choose(scores, rule="best_vs_random", min_gap=0.5, seed=seed) for seed in range(60)]
    assert {pair for pairs in found for pair in pairs} == {(1, 2), (1, 3)}  # 0.9 is too near


@given(ANSWERS, GAPS, st.integers(0, 5))
def test_rules_agree_with_their_definitions(answers, gap, seed):
    scores, texts = [score for score, _ in answers], [text for _, text in answers]
    first = [i for i in range(len(texts)) if texts[i] not in texts[:i]]
    every = [(i, j) for i, j in itertools.product(first, first) if scores[i] - scores[j] > gap]
    assert choose_pairs(scores, texts, rule="all", min_gap=gap, seed=seed) == every

    widest = max((scores[i] - scores[j] for i, j in every), default=None)
    expected = [min(pair for pair in every if scores[pair[0]] - scores[pair[1]] == widest)] if every else []
    assert choose_pairs(scores, texts, rule="max_min", min_gap=gap, seed=seed) == expected

    drawn = choose_pairs(scores, texts, rule="best_vs_random", min_gap=gap, seed=seed)
    assert len(drawn) == bool(every)
    for pair in drawn:
        assert pair in every and pair[0] == min(first, key=lambda i: (-scores[i], i))


@pytest.mark.parametrize(("scores", "texts"), [([1.0], ["a", "b"]), ([1.0, float("nan")], ["a", "b"])])
def test_scores_that_can_not_be_compared_are_refused(scores, texts):
    with pytest.raises(ValueError, match="a finite score for each of 2 texts"):
        choose_pairs(scores, texts, rule="max_min", min_gap=0.0, seed=0)
