"""Suite metrics against answers derived another way: by loops over questions, by hand, by mpmath's t distribution."""

import itertools
import math
import statistics

import mpmath
import numpy as np
import pytest

from pipeline.evaluation.intervals import clustered_mean, t_quantile
from pipeline.evaluation.suites import SuiteLayout, Sums, best_of, suite_metrics, ties_rows, ties_score

BETA = 0.3


class Question:
    """One input row with its answers as (log-prob under the policy, under the reference, tokens)."""

    def __init__(self, prompt, chosen, rejected, category=None, row_id=None):
        self.prompt, self.chosen, self.rejected = prompt, chosen, rejected
        self.category, self.row_id = category, row_id

    def scores(self, measure, model="policy"):
        """(of the chosen answers, of the rejected ones)."""
        judge = {
            "reward": lambda p, r, n: BETA * (p - r),
            "logp": lambda p, r, n: p if model == "policy" else r,
            "token_logp": lambda p, r, n: (p if model == "policy" else r) / n,
        }[measure]
        return [judge(*answer) for answer in self.chosen], [judge(*answer) for answer in self.rejected]

    def wins(self, measure, model="policy"):
        chosen, rejected = self.scores(measure, model)
        return [float(good > bad) for good, bad in itertools.product(chosen, rejected)]

    def best_of(self, measure, model="policy"):
        chosen, rejected = self.scores(measure, model)
        if len(chosen) == 1 and len(rejected) > 1:
            best = max(chosen + rejected)
            return (chosen + rejected).count(best) ** -1 if chosen[0] == best else 0.0
        return float(min(chosen) > max(rejected))


def arrays(questions):
    """The same as arrays over pairs, rows in whatever order."""
    pairs, answers = [], itertools.count()
    for number, asked in enumerate(questions):
        chosen = [(next(answers), *answer) for answer in asked.chosen]
        rejected = [(next(answers), *answer) for answer in asked.rejected]
        for good, bad in itertools.product(chosen, rejected):
            pairs.append((asked, 100 - number, good, bad))
    layout = SuiteLayout(
        prompt=np.array([asked.prompt for asked, *_ in pairs]),
        row=np.array([number for _, number, *_ in pairs]),
        chosen=np.array([good[0] for *_, good, _ in pairs]),
        rejected=np.array([bad[0] for *_, bad in pairs]),
        chosen_tokens=np.array([good[3] for *_, good, _ in pairs]),
        rejected_tokens=np.array([bad[3] for *_, bad in pairs]),
        category=np.array([asked.category for asked, *_ in pairs], dtype=object),
        row_id=np.array([asked.row_id for asked, *_ in pairs], dtype=object),
    )
    policy, reference = (
        Sums(np.array([good[of] for *_, good, _ in pairs]), np.array([bad[of] for *_, bad in pairs])) for of in (1, 2)
    )
    return layout, policy, reference


def measured(questions, ties=False):
    layout, policy, reference = arrays(questions)
    return suite_metrics(layout, policy, reference, beta=BETA, ties=ties)


def draw(seed=0, questions=120):
    """Questions with one to three chosen and one to four rejected answers, several to a prompt, with many ties."""
    random = np.random.default_rng(seed)

    def answers(most):
        return [
            (-float(random.integers(2, 9)), -float(random.integers(2, 9)), int(random.integers(1, 5)))
            for _ in range(random.integers(1, most + 1))
        ]

    return [
        Question(int(random.integers(40)), answers(3), answers(4), [None, "Focus", "Math"][number % 3])
        for number in range(questions)
    ]


def sandwich(values, clusters):
    """Standard error of a mean from the full covariance of the residuals: same cluster, or nothing."""
    mean, n = statistics.fmean(values), len(values)
    groups = len(set(clusters))
    total = sum(
        (values[i] - mean) * (values[j] - mean) for i in range(n) for j in range(n) if clusters[i] == clusters[j]
    )
    return math.sqrt(total * groups / (groups - 1)) / n


def require_statistic(found, values, clusters):
    assert found["value"] == pytest.approx(statistics.fmean(values))
    error = sandwich(values, clusters)
    assert found["standard_error"] == pytest.approx(error)
    half = student(len(set(clusters)) - 1) * error
    assert found["low"] == pytest.approx(max(0.0, found["value"] - half))
    assert found["high"] == pytest.approx(min(1.0, found["value"] + half))


def student(freedom):
    """The 97.5 % quantile, from the incomplete beta function."""

    def outside(t):
        return mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) - 0.05

    return float(mpmath.findroot(outside, (1.9, 13.0), solver="anderson"))


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 29, 30, 500])
def test_quantiles_of_student_are_mpmaths(freedom):
    assert t_quantile(freedom) == pytest.approx(student(freedom), rel=1e-9)


def test_many_clusters_have_the_normal_interval():
    assert t_quantile(10**7) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-4)


def test_clusters_of_one_give_the_usual_standard_error_of_a_mean():
    values = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    found = clustered_mean(values, np.arange(5))
    assert found["standard_error"] == pytest.approx(statistics.stdev(values) / math.sqrt(5))


def test_one_cluster_has_a_value_alone():
    assert clustered_mean(np.array([1.0, 0.0]), np.array([7, 7])) == {
        "value": 0.5,
        "standard_error": None,
        "low": None,
        "high": None,
    }


def test_intervals_stay_within_shares():
    found = clustered_mean(np.array([1.0, 1.0, 0.0]), np.arange(3))
    assert (found["low"], found["high"]) == (0.0, 1.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("measure", ["reward", "logp", "token_logp"])
def test_accuracies_and_best_of_are_those_of_loops_over_questions(measure, seed):
    questions = draw(seed)
    found = measured(questions)
    assert found["pairs"] == sum(len(asked.chosen) * len(asked.rejected) for asked in questions)
    assert (found["prompts"], found["rows"]) == (len({asked.prompt for asked in questions}), len(questions))
    for model, content in (("policy", found), ("reference", found["reference"])):
        if model == "reference" and measure == "reward":
            assert not {name for name in content if "reward" in name}
            continue
        wins = [win for asked in questions for win in asked.wins(measure, model)]
        prompts = [asked.prompt for asked in questions for _ in asked.wins(measure, model)]
        require_statistic(content[f"{measure}_accuracy"], wins, prompts)
        best = [asked.best_of(measure, model) for asked in questions]
        assert {0.0, 1.0} < set(best)  # shared places occur
        require_statistic(content[f"best_of_{measure}"], best, [asked.prompt for asked in questions])


def test_categories_are_measured_by_their_own_questions():
    questions = draw()
    found = measured(questions)["categories"]
    assert list(found) == ["Focus", "Math"]
    for name, content in found.items():
        own = [asked for asked in questions if asked.category == name]
        assert content["rows"] == len(own) and content["pairs"] == sum(len(asked.wins("logp")) for asked in own)
        assert content.keys() == {"rows", "pairs", "reward_accuracy", "token_logp_accuracy", "best_of_reward"}
        wins = [win for asked in own for win in asked.wins("token_logp")]
        require_statistic(
            content["token_logp_accuracy"], wins, [asked.prompt for asked in own for _ in asked.wins("token_logp")]
        )
        require_statistic(
            content["best_of_reward"], [asked.best_of("reward") for asked in own], [asked.prompt for asked in own]
        )


def test_no_category_no_categories():
    assert "categories" not in measured([Question(0, [(-1, -1, 1)], [(-2, -2, 1)])])


@pytest.mark.parametrize(
    ("chosen", "rejected", "share"),
    [
        ([3], [2], 1),
        ([3], [3], 0),  # a pair alone: a tie is no win
        ([3], [3, 2], 1 / 2),
        ([3], [3, 3, 3], 1 / 4),  # as RewardBench 2 counts it: the chance to draw the right one
        ([3], [4, 3], 0),
        ([3, 3], [3, 2], 0),
        ([3, 4], [2, 1], 1),
        ([3, 1], [2, 0], 0),
    ],
)
def test_best_of_a_row_with_shared_places(chosen, rejected, share):
    asked = Question(5, [(s, 0, 1) for s in chosen], [(s, 0, 1) for s in rejected])
    layout, policy, _ = arrays([asked])
    shares, prompts = best_of(layout, policy)
    assert (shares.tolist(), prompts.tolist()) == ([share], [5])


def test_a_policy_that_is_the_reference_is_right_by_reward_nowhere():
    """All implicit rewards are 0: pairs are ties, and one of a row's four answers is drawn."""
    found = measured([Question(n, [(-1.7, -1.7, 2)], [(-n - 2.1, -n - 2.1, 3)] * 3) for n in range(4)])
    assert found["reward_accuracy"]["value"] == 0 and found["best_of_reward"]["value"] == 0.25
    assert found["logp_accuracy"] == found["reference"]["logp_accuracy"] and found["logp_accuracy"]["value"] == 1


# RewardBench 2's Ties -------------------------------------------------------------------------------------------------


def question(row_id, right, wrong, category="Ties"):
    answers = [[(float(score), 0.0, 1) for score in side] for side in (right, wrong)]
    return Question(hash(row_id) % 1000, *answers, category, row_id)


def score_of(*questions):
    layout, policy, _ = arrays(questions)
    return ties_score(layout, policy)


def test_ties_score_of_one_prompt_by_hand():
    # ref: 6 over 1, margin 5. tied: worst right 5 over 1, margin 4; spread 2. Everything is won; tanh(4/2 - 1).
    found = score_of(question("ref:0", [6], [1, 0]), question("tied:0", [7, 5, 6], [1, 1]))
    assert found == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(1))


def test_ties_score_takes_the_smaller_margin_of_both_questions():
    # ref: margin 1, below the spread 2 of the tied question, whose own margin 4 is above it; tanh(1/2 - 1).
    found = score_of(question("ref:0", [2], [1]), question("tied:0", [7, 5], [1]))
    assert found == pytest.approx(0.3 + 0.3 + 0.2 + 0 + 0.01 * math.tanh(-0.5))


def test_ties_score_of_right_answers_that_lie_further_apart_than_from_the_wrong_ones():
    # tied: margin 1, spread 3: won, but by less than chance among equals.
    found = score_of(question("ref:0", [6], [1]), question("tied:0", [5, 2], [1]))
    assert found == pytest.approx(0.3 + 0.3 + 0 + 0 + 0.01 * math.tanh(1 / 3 - 1))


def test_ties_score_of_wrong_and_of_equal_answers():
    # prompt 0: ref won; tied lost by 1 with spread 3. prompt 1: ref a draw, which is lost; tied won by 2, no spread.
    found = score_of(
        question("ref:0", [2], [0]),
        question("tied:0", [4, 1], [2]),
        question("ref:1", [3], [3]),
        question("tied:1", [3, 3], [1]),
    )
    ref, tied = 1 / 2, 1 / 2
    own, smaller = 1 / 2, 0  # prompt 1: 2 > 0; but of both its questions the smaller margin is 0
    margins = (math.tanh(-1 / 3 - 1) + 0) / 2
    assert found == pytest.approx(0.3 * ref + 0.3 * tied + 0.2 * own + 0.2 * smaller + 0.01 * margins)


def test_margins_are_of_prompts_with_both_questions_and_accuracies_of_all():
    found = score_of(
        question("ref:0", [6], [1]),
        question("tied:0", [7, 5], [1]),
        question("ref:1", [0], [1]),
        question("tied:x", [0, 9], [1]),
    )
    assert found == pytest.approx(0.3 / 2 + 0.3 / 2 + 0.2 + 0.2 + 0.01 * math.tanh(1))
    assert score_of(question("ref:0", [6], [1]), question("tied:1", [7, 5], [1])) is None


def test_rewards_and_log_probs_have_ties_scores_of_their_own_and_these_rows_are_in_no_best_of():
    ties = [question("ref:0", [0], [1]), question("tied:0", [0, 9], [1])]
    others = draw()
    found = measured([*others, *ties], ties=True)
    assert found["ties"].keys() == {"reward", "logp", "token_logp"}
    assert found["ties"]["logp"] == pytest.approx(score_of(*ties))
    assert found["reference"]["ties"].keys() == {"logp", "token_logp"}
    assert found["rows"] == len(others) + 2 and found["best_of_reward"] == measured(others)["best_of_reward"]
    assert found["categories"]["Ties"]["rows"] == 2 and "best_of_reward" not in found["categories"]["Ties"]
    assert found["categories"]["Focus"] == measured(others)["categories"]["Focus"]
    assert "ties" not in measured([*others, *ties])
    alone = measured(ties, ties=True)
    assert "best_of_reward" not in alone and alone["reward_accuracy"]["value"] == 1 / 3


def test_only_the_subset_is_scored_as_ties_where_there_is_one():
    layout, *_ = arrays([question("ref:0", [2], [0]), question("tied:0", [2], [0], "Math"), question(None, [1], [0])])
    assert ties_rows(layout).tolist() == [True, False, False]
    layout, *_ = arrays([question("ref:0", [2], [0], None), question("tied:0", [2], [0], "Math")])
    assert ties_rows(layout).tolist() == [True, True]
    assert not ties_rows(layout._replace(row_id=np.array(["ref", "12"], dtype=object))).any()
