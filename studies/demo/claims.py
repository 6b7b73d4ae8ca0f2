"""What the papers lead one to expect on the demo, judged by the run's figures.

A difference counts if both its 95 % intervals, over seeds and over prompts, leave out zero.
"""

from collections.abc import Iterator, Sequence

from studies.demo.results import METRICS, Estimate, PolicyClass, Results
from studies.pages.markdown import Claim
from studies.pages.runs import REFERENCE

DPO, AUX = "dpo", "auxdpo"


def judge(results: Results, classes: Sequence[PolicyClass]) -> Iterator[Claim]:
    for each in classes:
        yield _dpo_raises_reward(results, each)
    for metric in ("reward", "value", "accuracy"):
        for each in classes:
            yield _aux_leads(results, each, metric)
    yield _aux_gains_most_where_least_trains(results, classes[0], classes[-1])
    yield _in_every_class(results, classes, "bdpo", "kl", "BDPO stays nearer to the reference than DPO")
    yield _in_every_class(results, classes, "bdpo", "dcr", "BDPO degrades fewer chosen responses than DPO")
    yield _in_every_class(results, classes, "bpo", "dcr", "BPO degrades fewer chosen responses than DPO")


def show(difference: Estimate, metric: str) -> str:
    return difference.show(METRICS[metric].digits)


def _dpo_raises_reward(results: Results, of: PolicyClass) -> Claim:
    difference = results.difference(of.name, DPO, REFERENCE, "reward")
    return Claim(
        f"DPO raises the expected reward above the reference's ({of.title})",
        difference.sign > 0,
        f"{results.estimate(of.name, DPO, 'reward').value:.3f} against "
        f"{results.estimate(of.name, REFERENCE, 'reward').value:.3f}, difference {show(difference, 'reward')}",
    )


def _aux_leads(results: Results, of: PolicyClass, metric: str) -> Claim:
    difference = results.difference(of.name, AUX, DPO, metric)
    return Claim(
        f"AuxDPO's {METRICS[metric].title} is above DPO's ({of.title})",
        difference.sign > 0,
        f"difference {show(difference, metric)}",
    )


def _aux_gains_most_where_least_trains(results: Results, least: PolicyClass, most: PolicyClass) -> Claim:
    metric = "value"
    gap = results.contrast(
        metric, (1, least.name, AUX), (-1, least.name, DPO), (-1, most.name, AUX), (1, most.name, DPO)
    )
    return Claim(
        f"AuxDPO gains more over DPO where least trains ({least.title}) than where most does ({most.title}), "
        f"in {METRICS[metric].title}",
        gap.sign > 0,
        f"difference of the differences {show(gap, metric)}",
    )


def _in_every_class(results: Results, classes: Sequence[PolicyClass], variant: str, metric: str, text: str) -> Claim:
    found = {each.title: results.difference(each.name, variant, DPO, metric) for each in classes}
    return Claim(
        f"{text}, whatever trains",
        all(difference.sign < 0 for difference in found.values()),
        "; ".join(f"{title} {show(difference, metric)}" for title, difference in found.items()),
    )
