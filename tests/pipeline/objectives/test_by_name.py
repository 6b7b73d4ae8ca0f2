"""What holds for every objective: declared hyper-parameters, honest flags, no pair that influences another's loss."""

import inspect
import math
import re
import typing

import pytest
import torch
from pydantic import AfterValidator, TypeAdapter

from pipeline.objectives import OBJECTIVES, PairLogps, bdpo
from pipeline.params import objectives as objective_params
from pipeline.params.ranges import Interval
from tests import ROOT
from tests.pipeline.objectives.cases import CASES, IDS, pair

VARIANTS = TypeAdapter(objective_params.AnyVariant)
DOCS = ROOT / "docs" / "objectives.md"
AUXDPO = "auxdpo"  # no function of log-probs alone: its offsets train too (test_offsets.py)
KTO = "kto"  # no function of pairs (test_kto.py)
LOGISTIC_IN_THE_MARGIN = ["dpo", "bdpo", "bpo", "dpop", "minor_dpo", "sigmoid_norm", "aot", "aot_unpaired", "robust"]


def classes(union: object) -> list[type[objective_params.Variant]]:
    """Members of a union of unions, each perhaps annotated."""
    if isinstance(union, type):
        return [union]
    members = typing.get_args(union)
    if typing.get_origin(union) is typing.Annotated:
        members = members[:1]
    return [cls for member in members for cls in classes(member)]


DECLARED = {
    typing.get_args(cls.model_fields["objective"].annotation)[0]: cls for cls in classes(objective_params.AnyVariant)
}


def variant(name: str, hyperparameters: dict) -> objective_params.Variant:
    """The validated variant of one of CASES."""
    if name == "weighted_sum":
        terms = [
            {"weight": term["weight"], "loss": {"objective": term["objective"], **term["hyperparameters"]}}
            for term in hyperparameters["terms"]
        ]
        return VARIANTS.validate_python({"objective": name, "terms": terms})
    return VARIANTS.validate_python({"objective": name, **hyperparameters})


def random_batch(n: int = 6) -> PairLogps:
    draw = torch.Generator().manual_seed(0)
    logps = [-20 * torch.rand(n, generator=draw, dtype=torch.float64) for _ in range(4)]
    return PairLogps(*logps, *(torch.randint(1, 30, (n,), generator=draw) for _ in range(2)))


def test_every_objective_has_declared_hyperparameters_of_the_same_names_and_defaults():
    assert DECLARED.keys() == OBJECTIVES.keys() | {AUXDPO, KTO}
    for name, objective in OBJECTIVES.items():
        keywords = {k: p for k, p in inspect.signature(objective).parameters.items() if p.kind is p.KEYWORD_ONLY}
        fields = {k: f for k, f in DECLARED[name].model_fields.items() if k not in ("objective", "settings")}
        assert keywords.keys() == fields.keys(), name
        for keyword, parameter in keywords.items():
            if parameter.default is not parameter.empty:
                assert parameter.default == fields[keyword].default, (name, keyword)


def test_every_objective_and_every_hyperparameter_is_tested_on_closed_forms():
    for name, cls in DECLARED.items():
        if name in (AUXDPO, KTO):
            continue
        tried = set().union(*(keywords for case, keywords in CASES if case == name))
        assert tried >= set(cls.model_fields) - {"objective", "settings", "divergence", "divergence_alpha"}, name


@pytest.mark.parametrize(("name", "hyperparameters"), CASES, ids=IDS)
def test_validated_hyperparameters_are_what_the_objective_takes(name, hyperparameters):
    given = variant(name, hyperparameters).hyperparameters()
    assert given.keys() >= hyperparameters.keys()
    x = random_batch()
    assert torch.equal(OBJECTIVES[name](x, **given), OBJECTIVES[name](x, **hyperparameters))


@pytest.mark.parametrize(("name", "hyperparameters"), CASES, ids=IDS)
def test_flags_say_what_the_loss_depends_on(name, hyperparameters):
    x, chosen = random_batch(), variant(name, hyperparameters)

    def changes(**others: torch.Tensor) -> bool:
        before, after = (OBJECTIVES[name](y, **hyperparameters) for y in (x, x._replace(**others)))
        return not torch.allclose(before, after, rtol=1e-12, atol=0)

    assert changes(ref_chosen=x.ref_chosen - 1.0, ref_rejected=x.ref_rejected + 2.0) == chosen.needs_reference
    assert changes(chosen_lengths=x.chosen_lengths * 3, rejected_lengths=x.rejected_lengths * 7) == (
        chosen.needs_lengths
    )


@pytest.mark.parametrize(("name", "hyperparameters"), CASES, ids=IDS)
def test_a_pairs_loss_is_its_own_unless_the_objective_needs_the_whole_batch(name, hyperparameters):
    """Hence micro-batches, ranks and several pairs of one prompt change nothing."""
    x = random_batch()
    whole = OBJECTIVES[name](x, **hyperparameters)
    alone = torch.cat([OBJECTIVES[name](PairLogps(*(v[i : i + 1] for v in x)), **hyperparameters) for i in range(6)])
    same = torch.allclose(whole, alone, rtol=1e-12, atol=0)
    assert same != variant(name, hyperparameters).needs_whole_batch


def test_losses_of_the_reference_itself_are_log_two():
    """The step-0 invariant of everything that is a logistic function of a margin of log-ratios."""
    x = pair(-12.0, -30.0, -12.0, -30.0)
    for name in LOGISTIC_IN_THE_MARGIN:
        assert OBJECTIVES[name](x, beta=0.1).item() == pytest.approx(math.log(2), abs=1e-12), name


def test_bdpo_refuses_a_mixture_that_is_no_mixture():
    for mixture in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            bdpo(pair(-1, -1, -1, -1), beta=0.1, mixture=mixture)


def test_a_sums_rewards_have_the_beta_of_its_first_term_that_has_one():
    terms = [
        {"loss": {"objective": "sft"}},
        {"loss": {"objective": "ipo", "beta": 0.4}},
        {"loss": {"objective": "dpo"}},
    ]
    assert VARIANTS.validate_python({"objective": "weighted_sum", "terms": terms}).reward_beta == 0.4
    assert VARIANTS.validate_python({"objective": "orpo"}).reward_beta == 1.0


def test_the_documented_tables_have_every_hyperparameter_with_its_default_and_range_and_what_an_objective_needs():
    rows: dict[str, list[str]] = {}
    for line in DOCS.read_text().splitlines():
        if line.startswith("| `"):
            assert len(line) <= 200, line
            # Between a name and its default may stand the symbol of the equations.
            rows.setdefault(line.split("|")[1].strip(" `"), []).append(re.sub("` [ελατδγρws] ", "` ", line))
    assert rows.keys() == DECLARED.keys()
    for name, cls in DECLARED.items():
        for field, info in cls.model_fields.items():
            if field in ("objective", "settings", "terms"):
                continue
            cell = f"`{field}` {info.default:g}" if isinstance(info.default, float) else f"`{field}` {info.default}"
            ranges = [m.func for m in info.metadata if isinstance(m, AfterValidator)]
            expected = [f"{cell} {r}" for r in ranges if isinstance(r, Interval)] or [cell]
            assert any(expected[0] in row for row in rows[name]), f"docs/objectives.md, {name}: no {expected[0]!r}"
        if name == "weighted_sum":
            continue
        made = cls(objective=name)
        lengths = (
            ["lengths"] if made.needs_lengths else ["lengths for `mean`"] if "over_tokens" in cls.model_fields else []
        )
        needs = ["reference"] * made.needs_reference + lengths
        assert rows[name][0].split("|")[3].strip() == (", ".join(needs) or "–"), name
