import math
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.demo import (
    MAX_PAIRS_PER_PROMPT,
    MAX_REWARD,
    MIN_REWARD,
    demo_rows,
    demo_sft_rows,
    solve,
    true_reward,
)
from pipeline.errors import RequestError
from pipeline.params import DemoParams

PARAMS = DemoParams(prompts=300, sft_rows=300)
ROWS = list(demo_rows(DemoParams(prompts=1500)))


@pytest.mark.parametrize(
    ("prompt", "category", "answer"),
    [
        ("Compute 34 + 17.", "addition", "51"),
        ("Compute 58 - 19.", "subtraction", "39"),
        ("Largest of 3, 8, 1, 5?", "largest", "8"),
        ("Largest of 9, 10, 2, 0?", "largest", "10"),
        ("Reverse d a b.", "reversal", "b a d"),
        ("Sort d a b a.", "sorting", "a a b d"),
    ],
)
def test_every_kind_of_task_is_solved(prompt, category, answer):
    assert solve(prompt)[:2] == (category, answer)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("Answer: 51", 3.0),
        ("Answer: 51.", 3.0),
        ("34 + 17 = 51. Answer: 51\n", 3.0),
        ("34 + 17 = 99. Answer: 51", 3.0),  # only the final answer counts
        ("51", 2.0),  # right, not in the form
        ("I say 12, no, 51", 2.0),
        ("Answer: 51. I hope this helps!", 2.0),
        ("Answer: 50 Answer: 51", 2.0),  # the form has one mark
        ("Answer: 49", 1.0 + 0.5 * 2 * 0.8),
        ("Answer: 41", 1.0),
        ("Answer: -51", 1.0),
        ("Answer: " + "9" * 5000, 1.0),
        ("Answer: none", 0.0),
        ("51 is it. Answer:", 0.0),
        ("no idea", 0.0),
        ("", 0.0),
        ("a b c d e f g h i 51", 2.0),
        ("a b c d e f g h i j k 51", 1.8),  # two words too many
        ("word " * 10_000 + "51", 1.0),
        ("word " * 10_000, -1.0),
    ],
)
def test_reward_of_a_sum(response, reward):
    assert true_reward("Compute 34 + 17.", response) == pytest.approx(reward)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("Answer: a b d", 3.0),
        ("In order: a d b. Answer: a b d", 3.0),
        ("Answer: a d b", 1.0 + 2 * 0.5 / 3),
        ("Answer: a b", 1.0 + 2 * 0.5 * 2 / 3),
        ("Answer: a b d d", 1.0 + 2 * 0.5 * 3 / 4),
        ("I think it is a b d", 2.0),
        ("Answer: abd", 0.0),
        ("Answer: 7", 0.0),
    ],
)
def test_reward_of_sorted_letters(response, reward):
    assert true_reward("Sort b a d.", response) == pytest.approx(reward)


@settings(deadline=None)  # machines under load
@given(st.sampled_from([row.values["prompt"] for row in ROWS]), st.text() | st.from_regex(r"(Answer: ?)?-?\d*[a-e ]*"))
def test_any_response_has_a_bounded_reward(prompt, response):
    assert MIN_REWARD <= true_reward(prompt, response) <= MAX_REWARD


def test_a_text_that_is_no_task_has_no_reward():
    with pytest.raises(ValueError, match="not a prompt of the demo"):
        true_reward("Tell me a joke.", "Answer: 51")


def test_a_negative_difference_is_understood():
    assert true_reward("Compute 3 - 5.", "Answer: -2") == 3.0


def test_rows_carry_the_true_rewards_and_the_category():
    for row in ROWS:
        values = row.values
        assert values["chosen"] != values["rejected"]
        assert values["chosen_reward"] == true_reward(values["prompt"], values["chosen"])
        assert values["rejected_reward"] == true_reward(values["prompt"], values["rejected"])
        assert values["category"] == solve(values["prompt"]).category


def test_pair_counts_are_uneven_and_pairs_of_a_prompt_share_responses():
    by_prompt = defaultdict(list)
    for row in ROWS:
        by_prompt[row.values["prompt"]].append((row.values["chosen"], row.values["rejected"]))
    assert len(by_prompt) == 1500
    sizes = Counter(len(pairs) for pairs in by_prompt.values())
    assert set(sizes) == set(range(1, MAX_PAIRS_PER_PROMPT + 1))
    assert all(len({frozenset(pair) for pair in pairs}) == len(pairs) for pairs in by_prompt.values())
    responses = sum(len({text for pair in pairs for text in pair}) for pairs in by_prompt.values())
    assert responses < 0.75 * 2 * len(ROWS)
    assert len(Counter(row.values["category"] for row in ROWS)) == 5


def test_preferences_follow_bradley_terry_on_the_true_reward():
    """Within every band of reward differences, the better response wins as often as sigmoid(difference) says."""
    differences = [row.values["chosen_reward"] - row.values["rejected_reward"] for row in ROWS]
    bands = [0.05, 0.6, 1.2, 2.0, 4.0]
    for low, high in pairwise(bands):
        inside = [d for d in differences if low <= abs(d) < high]
        assert len(inside) > 200
        expected = [1 / (1 + math.exp(-abs(d))) for d in inside]
        error = math.sqrt(sum(p * (1 - p) for p in expected))
        assert abs(sum(d > 0 for d in inside) - sum(expected)) < 4 * error


def test_asking_for_more_keeps_what_there_was():
    more = DemoParams(prompts=330, sft_rows=400)
    rows, more_rows = list(demo_rows(PARAMS)), list(demo_rows(more))
    assert more_rows[: len(rows)] == rows and len(more_rows) > len(rows)
    assert list(demo_sft_rows(more))[:300] == list(demo_sft_rows(PARAMS))


def test_the_sft_rows_are_other_prompts_of_the_same_kinds_whatever_the_sizes():
    sft = [row.values for row in demo_sft_rows(DemoParams(sft_rows=2000))]
    prompts = {row["prompt"] for row in sft}
    assert len(prompts) == 2000
    assert prompts.isdisjoint(row.values["prompt"] for row in ROWS)
    assert {solve(prompt).category for prompt in prompts} == {row.values["category"] for row in ROWS}


def test_completions_are_right_sometimes_and_leave_room():
    sft = [row.values for row in demo_sft_rows(DemoParams(sft_rows=1000))]
    rewards = [true_reward(row["prompt"], row["completion"]) for row in sft]
    assert 0.2 < sum(reward == MAX_REWARD for reward in rewards) / 1000 < 0.6
    assert 1.0 < sum(rewards) / 1000 < 2.5


def test_another_seed_gives_other_rows():
    assert list(demo_rows(PARAMS)) != list(demo_rows(PARAMS.model_copy(update={"seed": 1})))


def test_the_rows_never_change_between_releases():
    first = next(demo_rows(DemoParams())).values
    assert first["prompt"] == "Compute 61 + 0."
    assert first["chosen"] == "61 + 0 = 61. Answer: 61"
    assert first["rejected"] == "Let me think about it for a moment, I would say 57. Answer: 57"


def test_more_prompts_than_there_are_is_a_wrong_request():
    with pytest.raises(RequestError, match=r"prepare\.demo\.prompts is 100000.*distinct prompts"):
        list(demo_rows(DemoParams(prompts=100_000)))
