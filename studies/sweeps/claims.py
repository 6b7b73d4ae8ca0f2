"""What the objectives' definitions and the papers lead one to expect of the sweep, judged by its figures.

A claim about a difference holds if it has the claimed sign and its 95 % interval over prompts leaves out zero.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.params import Params
from pipeline.params.objectives import BDPO, BPO
from studies.pages.intervals import Mean, clustered_interval
from studies.pages.markdown import Claim
from studies.pages.runs import Cells

SERIES = {"bdpo": "BDPO, mixture", "bpo_logistic": "BPO, alpha, logistic", "bpo_hinge": "BPO, alpha, hinge"}


class Setting(NamedTuple):
    """One variant of the sweep: which series it belongs to, and the value that varies in it."""

    variant: str
    series: str
    value: float


def settings(params: Params) -> list[Setting]:
    """The sweep's variants in order of series and value."""
    found = []
    for name in params.sweep.variants:
        variant = params.train.variants[name]
        if isinstance(variant, BDPO):
            found.append(Setting(name, "bdpo", variant.mixture))
        elif isinstance(variant, BPO):
            found.append(Setting(name, f"bpo_{variant.link}", variant.alpha))
    return sorted(found, key=lambda setting: (list(SERIES).index(setting.series), setting.value))


def judge(cells: Cells, sweep: Sequence[Setting]) -> list[Claim]:
    by_series = {name: [setting for setting in sweep if setting.series == name] for name in SERIES}
    claims = [_between_ends(cells, by_series["bdpo"], "dcr", "higher", "its bound on the chosen response is looser")]
    for name in ("bpo_logistic", "bpo_hinge"):
        because = "the rejected reward is to fall 1/alpha times as far"
        claims.append(_between_ends(cells, by_series[name], "margin", "lower", because))
    claims.append(_bpo_degrades_less(cells, by_series))
    claims.append(_links_agree(cells, by_series["bpo_logistic"], by_series["bpo_hinge"]))
    return claims


def difference(cells: Cells, one: str, other: str, column: str) -> Mean:
    """The mean of `one` less `other`, pair by pair, over prompts."""
    ours, prompts = cells.by_pair(one, column)
    theirs, _ = cells.by_pair(other, column)
    return clustered_interval(ours - theirs, prompts)


def _between_ends(cells: Cells, series: Sequence[Setting], column: str, direction: str, because: str) -> Claim:
    first, last = series[0], series[-1]
    change = difference(cells, last.variant, first.variant, column)
    values = ", ".join(f"{cells.over_seeds(each.variant, column).value:.3f}" for each in series).replace("-", "−")
    return Claim(
        f"{SERIES[first.series]}: {column} at {last.value:g} is {direction} than at {first.value:g} ({because})",
        change.low > 0 if direction == "higher" else change.high < 0,
        f"{values} from {first.value:g} to {last.value:g}; difference {change.show(3)}",
    )


def _bpo_degrades_less(cells: Cells, by_series: dict[str, list[Setting]]) -> Claim:
    bpo = max(
        cells.over_seeds(each.variant, "dcr").value
        for name in ("bpo_logistic", "bpo_hinge")
        for each in by_series[name]
    )
    bdpo = min(cells.over_seeds(each.variant, "dcr").value for each in by_series["bdpo"])
    return Claim(
        "BPO, whatever alpha and link, degrades fewer chosen responses (dcr) than BDPO at any mixture",
        bpo < bdpo,
        f"largest dcr of BPO {bpo:.3f}, smallest of BDPO {bdpo:.3f}",
    )


def _links_agree(cells: Cells, logistic: Sequence[Setting], hinge: Sequence[Setting]) -> Claim:
    pairs = [
        (one.value, difference(cells, one.variant, other.variant, "accuracy"))
        for one, other in zip(logistic, hinge, strict=True)
    ]
    value, largest = max(pairs, key=lambda pair: abs(pair[1].value))
    return Claim(
        "BPO's link makes no difference to accuracy that these pairs could show, at any alpha",
        all(change.low <= 0 <= change.high for _, change in pairs),
        f"largest difference, logistic less hinge, at alpha {value:g}: {largest.show(3)}",
    )
