"""Hyper-parameters of every preference objective with their ranges; no torch, so that every command may read them.

The fields of a class below, less `objective` and `settings`, are the keyword arguments of the function of the same
name in pipeline/objectives (a test keeps the two in step).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.params.ranges import INFINITY, Interval

Beta = Annotated[float, AfterValidator(Interval(0, INFINITY))]
Weight = Annotated[float, AfterValidator(Interval(0, INFINITY))]
AtLeastZero = Annotated[float, AfterValidator(Interval(0, INFINITY, "[)"))]
FlippedShare = Annotated[float, AfterValidator(Interval(0, 0.5, "[)"))]
Exponent = Annotated[float, AfterValidator(Interval(0, 2, "[]"))]
OverTokens = Literal["sum", "mean"]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


class Variant(BaseModel):
    """One policy to train: an objective, its hyper-parameters, and `settings` that override the `train` section."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def name_what_exists(cls, raw: Any) -> Any:
        unknown = sorted(set(raw) - set(cls.model_fields)) if isinstance(raw, dict) else []
        if unknown:
            known = ", ".join(name for name in cls.model_fields if name not in ("objective", "settings"))
            raise ValueError(f"unknown key {', '.join(map(str, unknown))}; {raw.get('objective')} has {known}")
        return raw

    @property
    def needs_reference(self) -> bool:
        """Whether the loss depends on the reference's log-probs."""
        return True

    @property
    def needs_whole_batch(self) -> bool:
        """Whether the loss of a batch is more than the mean over its pairs."""
        return False

    @property
    def reads_feedback(self) -> bool:
        """Whether it learns from single responses that are desirable or not, instead of pairs."""
        return False

    @property
    def needs_sketches(self) -> bool:
        """Whether training reads gradient sketches of the training responses."""
        return False

    @property
    def needs_lengths(self) -> bool:
        """Whether the loss depends on the responses' lengths."""
        return getattr(self, "over_tokens", "sum") == "mean" and getattr(self, "weight", 1.0) > 0

    @property
    def reward_beta(self) -> float:
        """The beta of the reward metrics; 1, which is plain nats, where the objective has none."""
        return float(getattr(self, "beta", 1.0))

    def hyperparameters(self) -> dict[str, Any]:
        return self.model_dump(exclude={"objective", "settings"})


class _Scaled(Variant):
    beta: Beta = 0.1


class _Divergent(_Scaled):
    divergence: Divergence = "reverse_kl"
    divergence_alpha: Exponent = 0.5  # read for divergence: alpha


class DPO(_Divergent):
    objective: Literal["dpo"]
    label_smoothing: FlippedShare = 0.0


class BDPO(_Scaled):
    objective: Literal["bdpo"]
    mixture: Annotated[float, AfterValidator(Interval(0, 1))] = 0.5


class BPO(_Scaled):
    objective: Literal["bpo"]
    alpha: Annotated[float, AfterValidator(Interval(0, 1, "(]"))] = 1.0
    link: Literal["logistic", "hinge"] = "logistic"


class DPONLL(_Scaled):
    objective: Literal["dpo_nll"]
    weight: AtLeastZero = 1.0
    over_tokens: OverTokens = "sum"
    label_smoothing: FlippedShare = 0.0


class DPOP(_Scaled):
    objective: Literal["dpop"]
    penalty: AtLeastZero = 50.0


class MinorDPO(_Scaled):
    objective: Literal["minor_dpo"]


class Robust(_Divergent):
    objective: Literal["robust"]
    label_smoothing: FlippedShare = 0.1


class Hinge(_Divergent):
    objective: Literal["hinge"]


class IPO(_Divergent):
    objective: Literal["ipo"]
    over_tokens: OverTokens = "sum"


class EXOPair(_Divergent):
    objective: Literal["exo_pair"]
    label_smoothing: Annotated[float, AfterValidator(Interval(0, 0.5))] = 1e-3  # at 0 the loss has a log 0


class DiscoPOP(_Divergent):
    objective: Literal["discopop"]
    tau: Annotated[float, AfterValidator(Interval(0, 1, "(]"))] = 0.05  # above 1 a lost pair's loss is no float


class SigmoidNorm(_Divergent):
    objective: Literal["sigmoid_norm"]

    @property
    def needs_lengths(self) -> bool:
        return True


class _Sorting(_Scaled):
    label_smoothing: FlippedShare = 0.0

    @property
    def needs_whole_batch(self) -> bool:
        return True


class AOT(_Sorting):
    objective: Literal["aot"]


class AOTUnpaired(_Sorting):
    objective: Literal["aot_unpaired"]


class SPPO(_Scaled):
    objective: Literal["sppo"]
    beta: Beta = 1e-3


class NCAPair(_Scaled):
    objective: Literal["nca_pair"]


class BCOPair(_Scaled):
    objective: Literal["bco_pair"]
    shift: Annotated[float, AfterValidator(Interval(-INFINITY, INFINITY))] = 0.0


class APOZero(_Scaled):
    objective: Literal["apo_zero"]


class APODown(_Scaled):
    objective: Literal["apo_down"]


class _ReferenceFree(Variant):
    @property
    def needs_reference(self) -> bool:
        return False


class SFT(_ReferenceFree):
    objective: Literal["sft"]
    over_tokens: OverTokens = "sum"


class SLiC(_ReferenceFree):
    objective: Literal["slic"]
    margin: AtLeastZero = 1.0
    weight: AtLeastZero = 0.0
    over_tokens: OverTokens = "sum"


class CPO(_ReferenceFree):
    objective: Literal["cpo"]
    beta: Beta = 0.1
    weight: AtLeastZero = 1.0
    over_tokens: OverTokens = "sum"
    label_smoothing: FlippedShare = 0.0


class SimPO(_ReferenceFree):
    objective: Literal["simpo"]
    beta: Beta = 2.0
    gamma: AtLeastZero = 1.0
    label_smoothing: FlippedShare = 0.0

    @property
    def needs_lengths(self) -> bool:
        return True


class ORPO(_ReferenceFree):
    objective: Literal["orpo"]
    weight: AtLeastZero = 0.1

    @property
    def needs_lengths(self) -> bool:
        return True


_Single = Annotated[
    DPO
    | BDPO
    | BPO
    | DPONLL
    | DPOP
    | MinorDPO
    | Robust
    | Hinge
    | IPO
    | EXOPair
    | DiscoPOP
    | SigmoidNorm
    | AOT
    | AOTUnpaired
    | SPPO
    | NCAPair
    | BCOPair
    | APOZero
    | APODown
    | SFT
    | SLiC
    | CPO
    | SimPO
    | ORPO,
    Field(discriminator="objective"),
]


class WeightedTerm(BaseModel):
    """One summand: `{weight: 0.8, loss: {objective: dpo, beta: 0.1}}`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    weight: Annotated[float, AfterValidator(Interval(0, INFINITY))] = 1.0
    loss: _Single

    @field_validator("loss")
    @classmethod
    def settings_are_the_sums(cls, loss: Variant) -> Variant:
        if loss.settings:
            raise ValueError("settings belong to the variant, not to a term of its sum")
        return loss


class WeightedSum(Variant):
    """A weighted sum of other objectives; rewards are reported with the beta of the first term that has one."""

    objective: Literal["weighted_sum"]
    terms: list[WeightedTerm] = Field(min_length=1)

    @property
    def needs_reference(self) -> bool:
        return any(term.loss.needs_reference for term in self.terms)

    @property
    def needs_whole_batch(self) -> bool:
        return any(term.loss.needs_whole_batch for term in self.terms)

    @property
    def needs_lengths(self) -> bool:
        return any(term.loss.needs_lengths for term in self.terms)

    @property
    def reward_beta(self) -> float:
        return next((float(term.loss.beta) for term in self.terms if hasattr(term.loss, "beta")), 1.0)

    def hyperparameters(self) -> dict[str, Any]:
        return {
            "terms": [
                {"weight": t.weight, "objective": t.loss.objective, "hyperparameters": t.loss.hyperparameters()}
                for t in self.terms
            ]
        }


class KTO(_Scaled):
    """Reads rows of feedback instead of pairs, with a baseline over the batch (pipeline/objectives/feedback.py)."""

    objective: Literal["kto"]
    desirable_weight: AtLeastZero = 1.0
    undesirable_weight: AtLeastZero = 1.0

    @property
    def needs_whole_batch(self) -> bool:
        return True

    @property
    def reads_feedback(self) -> bool:
        return True


class AuxDPO(_Scaled):
    """No function of log-probs alone: its offsets train beside the policy (pipeline/auxdpo/offsets.py).

    Of null_weight and null_weight_absolute one is a number and the other None.
    """

    objective: Literal["auxdpo"]
    constraint: Literal["penalty", "projection", "batch"] = "penalty"
    null_weight: Weight | None = 20.0  # in m / (4 mean ||g||^2), docs/auxdpo.md; at 0 offsets fit the labels alone
    null_weight_absolute: Weight | None = None  # instead: the factor itself, in whatever scale the gradients have
    ridge: AtLeastZero = 0.0
    rank: Annotated[int, Field(ge=1)] = 256  # read for constraint: projection
    weights: Literal["responses", "sides"] = "responses"  # of the null space: a response once, or once a pair side
    centred: bool = True  # offsets enter the constraint less their prompt's mean, which no margin sees
    offset_learning_rate: Weight = 0.02

    @model_validator(mode="before")
    @classmethod
    def take_one_weight(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        names = ("null_weight", "null_weight_absolute")
        given = {name: raw[name] for name in names if raw.get(name) is not None}
        if len(given) == len(names):
            raise ValueError(
                f"null_weight {given['null_weight']} and null_weight_absolute {given['null_weight_absolute']} are both "
                "given, expected one of them: null_weight counts in m / (4 mean ||g||^2), null_weight_absolute is the "
                "factor itself. Set the other to null or leave it out"
            )
        others = {name: value for name, value in raw.items() if name not in names}
        return others | ({"null_weight": None} | given if given else {})

    @classmethod
    def from_record(cls, hyperparameters: dict[str, Any]) -> Self:
        """From train.json. Records without null_weight_absolute are older than it: there null_weight meant that."""
        found = dict(hyperparameters)
        if "null_weight_absolute" not in found and "null_weight" in found:
            found["null_weight_absolute"] = found.pop("null_weight")
        return cls.model_validate({"objective": "auxdpo"} | found)

    @property
    def needs_sketches(self) -> bool:
        return True


AnyVariant = Annotated[_Single | WeightedSum | KTO | AuxDPO, Field(discriminator="objective")]
