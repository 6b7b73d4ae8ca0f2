"""evaluate.json's numbers on given arrays."""

import numpy as np
import pytest

from pipeline.evaluation.metrics import (
    PairValues,
    category_metrics,
    mean_over_prompts,
    pair_metrics,
    reference_metrics,
)

# Three pairs; log-ratios of chosen: +2, -1, 0; of rejected: -1, +1, 0.
PAIRS = PairValues(
    chosen=np.array([-8.0, -6.0, -3.0]),
    rejected=np.array([-9.0, -4.0, -2.0]),
    ref_chosen=np.array([-10.0, -5.0, -3.0]),
    ref_rejected=np.array([-8.0, -5.0, -2.0]),
    chosen_tokens=np.array([4, 2, 1]),
)


def test_rewards_are_beta_times_the_log_ratio():
    found = pair_metrics(PAIRS, beta=0.5)
    assert found["rewards/chosen"] == pytest.approx(0.5 * (2 - 1 + 0) / 3)
    assert found["rewards/rejected"] == pytest.approx(0.5 * (-1 + 1 + 0) / 3)
    assert found["rewards/margins"] == pytest.approx(0.5 * (3 - 2 + 0) / 3)


def test_a_tie_counts_as_wrong():
    assert pair_metrics(PAIRS, beta=0.1)["rewards/accuracies"] == pytest.approx(1 / 3)
    assert pair_metrics(PAIRS, beta=0.1)["logps/accuracies"] == pytest.approx(1 / 3)


def test_dcr_is_the_share_of_chosen_responses_that_lost_probability():
    assert pair_metrics(PAIRS, beta=0.1)["dcr"] == pytest.approx(1 / 3)


def test_nll_is_per_token_over_all_chosen_tokens():
    assert pair_metrics(PAIRS, beta=0.1)["nll/chosen"] == pytest.approx(17 / 7)


def test_in_distribution_logp_adds_the_probabilities_of_both_sides():
    expected = np.mean([np.log(np.exp(c) + np.exp(r)) for c, r in zip(PAIRS.chosen, PAIRS.rejected, strict=True)])
    assert pair_metrics(PAIRS, beta=0.1)["in_distribution_logp"] == pytest.approx(expected)


def test_long_responses_do_not_underflow():
    far = PairValues(*(np.array([-5000.0]) for _ in range(4)), np.array([900]))
    assert pair_metrics(far, beta=1.0)["in_distribution_logp"] == pytest.approx(-5000 + np.log(2))


def test_reference_is_measured_on_the_same_pairs():
    assert reference_metrics(PAIRS) == {
        "logps/accuracies": 0.0,
        "logps/chosen": -6.0,
        "logps/rejected": -5.0,
        "nll/chosen": pytest.approx(18 / 7),
    }


def test_categories_are_parts_of_the_whole():
    found = category_metrics(PAIRS, ["sums", None, "sums"], beta=0.5)
    assert found == {"sums": {"pairs": 2, "rewards/accuracies": 0.5, "rewards/margins": 0.75, "dcr": 0.0}}
    assert category_metrics(PAIRS, [None] * 3, beta=0.5) == {}


def test_standard_error_counts_prompts_and_not_samples():
    values = np.array([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    mean, error = mean_over_prompts(values)
    assert mean == 2.0
    assert error == pytest.approx(np.std([1, 3], ddof=1) / np.sqrt(2))  # six equal-looking samples are two draws
    assert mean_over_prompts(values[:1]) == (1.0, None)
