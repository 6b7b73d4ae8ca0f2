"""What the toy's runs say to each claim: mass that left the distribution, and what the chosen response kept."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from studies.pages.markdown import Claim
from studies.toy.networks import Run, ToyParams

Runs = Mapping[tuple[str, str], Run]

CHOSEN, OUTSIDE = 0, 2  # in a trajectory's last dimension
MOVED = 0.01  # a smaller change of probability is called none
WITH_NLL = ("dpo_nll", "slic_nll", "orpo", "sft")


@dataclass(frozen=True)
class Change:
    """How the mass out of distribution changed from the reference's, mean over seeds with 1.96 standard errors."""

    end: float
    end_error: float
    rise: float  # the largest of the drawn steps
    rise_error: float


def change(run: Run) -> Change:
    outside = run.trajectory[..., OUTSIDE] - run.trajectory[0, :, OUTSIDE]
    end, rise = outside[-1], outside.amax(dim=0)
    return Change(end.mean().item(), _error(end), rise.mean().item(), _error(rise))


def _error(values: Tensor) -> float:
    return float(1.96 * values.std().item() / len(values) ** 0.5)


def moves_out(x: Change) -> bool:
    """On the way at least, by more than MOVED and more than chance."""
    return x.rise > MOVED and x.rise - x.rise_error > 0


def ends_out(x: Change) -> bool:
    return x.end > MOVED and x.end - x.end_error > 0


@dataclass(frozen=True)
class Moved:
    """In which settings each objective moved mass out, and the figures."""

    settings: int
    changes: Mapping[tuple[str, str], Change]  # by (setting, objective)
    passing: Mapping[str, list[str]]  # objective -> settings where it did so at some time
    ended: Mapping[str, list[str]]  # ... where it had at the end

    def places(self, found: list[str]) -> str:
        return f"in {len(found)} of {self.settings} settings" + (f" ({', '.join(found)})" if found else "")


def moved(params: ToyParams, runs: Runs) -> Moved:
    changes = {key: change(run) for key, run in runs.items()}

    def where(holds: Callable[[Change], bool]) -> dict[str, list[str]]:
        return {o: [s for s in params.settings if holds(changes[s, o])] for o in params.objectives}

    return Moved(len(params.settings), changes, where(moves_out), where(ends_out))


def papers_claims(params: ToyParams, runs: Runs) -> Iterator[Claim]:
    found = moved(params, runs)
    on_the_way, ended = found.passing["dpo"], found.ended["dpo"]
    yield Claim(
        "DPO moves mass out of distribution on the way, in some setting", bool(on_the_way), found.places(on_the_way)
    )
    yield Claim(
        "DPO has moved mass out of distribution at the last step, in some setting", bool(ended), found.places(ended)
    )
    yield _none_out(found, "bdpo")
    lowest = _lowest_ratios(params, runs)
    # A fall, not the rounding of a policy that has not moved.
    fallen = {objective: ratio for objective, ratio in lowest.items() if ratio < 0.999}
    yield Claim(
        "DPO lowers the chosen response, of some prompt at some time in some setting",
        "dpo" in fallen,
        f"lowest chosen / reference {lowest['dpo']:.3f}. Below 1: "
        + (", ".join(f"{name} {ratio:.3f}" for name, ratio in fallen.items()) or "no objective"),
    )
    floor = 1 - params.objectives["bdpo"].hyperparameters()["mixture"]
    yield Claim(
        f"BDPO keeps π(chosen) ≥ {floor:g} π_ref(chosen) at every step",
        lowest["bdpo"] >= floor,
        f"lowest chosen / reference {lowest['bdpo']:.3f}",
    )
    yield Claim(
        "BPO never lets the chosen reward of a prompt fall below 0",
        "bpo" not in fallen,
        f"lowest chosen / reference {lowest['bpo']:.3f}",
    )


def own_claims(params: ToyParams, runs: Runs) -> Iterator[Claim]:
    found = moved(params, runs)
    orthogonal = {s: x.reference for s, x in params.settings.items() if x.reference and x.prompts == "one_hot"}
    yield Claim(
        "With orthogonal prompts, DPO moves mass out just where the reference has rejected likelier than chosen",
        all((s in found.passing["dpo"]) == (reference[1] > reference[0]) for s, reference in orthogonal.items()),
        "; ".join(f"{s} {found.changes[s, 'dpo'].rise:+.3f}" for s in orthogonal),
    )
    yield _no_more_than_dpo(found, list(params.settings), "bdpo")
    yield _none_out(found, "bpo")
    yield _no_more_than_dpo(found, list(params.settings), "bpo")
    yield Claim(
        f"Objectives with an NLL of the chosen response ({', '.join(WITH_NLL)}) never move mass out",
        not any(found.passing[name] for name in WITH_NLL),
        "; ".join(f"{name} {found.places(found.passing[name])}" for name in WITH_NLL),
    )
    yield Claim(
        "No objective has moved mass out of distribution at the last step, in any setting",
        not any(found.ended.values()),
        "; ".join(f"{name} {found.places(where)}" for name, where in found.ended.items() if where) or "none did",
    )
    ends = {key: (run.trajectory[-1] / run.trajectory[0])[:, CHOSEN].mean().item() for key, run in runs.items()}
    least = min(ends, key=lambda key: ends[key])
    yield Claim(
        "Some objective ends with a less likely chosen response than the reference's",
        ends[least] < 1,
        f"least: {ends[least]:.2f} times as likely ({least[1]}, {least[0]})",
    )


def _none_out(found: Moved, name: str) -> Claim:
    where = found.passing[name]
    return Claim(f"{name.upper()} moves no mass out of distribution, at any time", not where, found.places(where))


def _no_more_than_dpo(found: Moved, settings: list[str], name: str) -> Claim:
    rises = {s: (found.changes[s, "dpo"].rise, found.changes[s, name].rise) for s in settings}
    return Claim(
        f"{name.upper()} nowhere moves more out than DPO does",
        all(its <= dpos + MOVED for dpos, its in rises.values()),
        f"largest rise of DPO, {name.upper()}: " + "; ".join(f"{s} {a:+.3f}, {b:+.3f}" for s, (a, b) in rises.items()),
    )


def _lowest_ratios(params: ToyParams, runs: Runs) -> dict[str, float]:
    """By objective: the least pi_theta(chosen) / pi_ref(chosen) of any setting, prompt, seed and step."""
    return {
        objective: min(runs[setting, objective].lowest_chosen_ratio.min().item() for setting in params.settings)
        for objective in params.objectives
    }
