"""params.yaml as a whole: read, --set applied, validated; every error names file, key, value and what is allowed.

Strict means: an unknown key, a wrong type or a value out of range is an error that names the key. No section imports an
engine, so every command can validate in milliseconds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.errors import RequestError
from pipeline.params.data import ModelParams, PrepareParams
from pipeline.params.ranges import NonNegative, Section
from pipeline.params.sampling import SampleParams
from pipeline.params.scoring import EvaluateParams, ScoreParams, SketchParams
from pipeline.params.suites import check_suites
from pipeline.params.training import SftParams, Trainable, TrainParams, variant_loop


class _NoYaml(Exception):
    """A text is not valid YAML; the message says where and why."""


def _parsed(text: str) -> Any:
    """By ruamel, which reads YAML 1.2, as DVC does; PyYAML would take 1e-6 for a string. Raises _NoYaml.

    Imported here: training and sketching are told their sections as JSON, and shall run where ruamel isn't installed.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise _NoYaml(str(error)) from error


class SweepParams(Section):
    variants: list[str] = Field(min_length=1)
    seeds: list[NonNegative] = Field(min_length=1)

    @field_validator("variants", "seeds")
    @classmethod
    def no_cell_twice(cls, values: list[Any]) -> list[Any]:
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ValueError(f"{repeated} stand there more than once, so that several cells would be one")
        return values


class Params(Section):
    """The whole file; stages read it only to pick their own section."""

    model: ModelParams
    prepare: PrepareParams
    sft: SftParams
    pairs: Literal["prepared", "sampled"] = "prepared"  # what policies train on; dvc.yaml takes its path from here
    score: ScoreParams
    sketch: SketchParams = SketchParams()
    sample: SampleParams = SampleParams()
    trainable: Trainable
    train: TrainParams
    sweep: SweepParams
    evaluate: EvaluateParams

    @model_validator(mode="after")
    def sections_agree(self) -> Self:
        unknown = [name for name in self.sweep.variants if name not in self.train.variants]
        if unknown:
            raise ValueError(f"sweep.variants names {unknown}, but train.variants has {sorted(self.train.variants)}")
        needing = [name for name in self.sweep.variants if self.train.variants[name].needs_sketches]
        if needing and self.sketch.mode == "none":
            raise ValueError(
                f"sweep.variants has {needing}, which need gradient sketches; set sketch.mode to tensorsketch (or to "
                "exact, for a small LoRA), found none"
            )
        if self.sketch.by_engine:
            _check_engine_sketches(self.sketch, self.score, self.trainable, needing)
        if self.pairs == "sampled" and self.sample.scorer == "none":
            raise ValueError("pairs: sampled needs answers that are sampled and scored; set sample.scorer, found none")
        if self.prepare.sft.source == "none" and self.sft.epochs > 0:
            raise ValueError("prepare.sft.source: none leaves nothing to train on; set sft.epochs: 0")
        if self.model.scratch is not None and self.sft.epochs == 0:
            raise ValueError("model.scratch has random weights; set sft.epochs above 0 or give model.name")
        check_suites(self.evaluate.suites, self.prepare, self.evaluate.suites_input)
        return self


def _check_engine_sketches(sketch: SketchParams, score: ScoreParams, trainable: Trainable, needing: list[str]) -> None:
    """Raise ValueError where the engine that scores can't give these sketches, or nobody could train with them."""
    found = "sketch.source: engine takes the head's gradient from the states of the engine that scores; found"
    if sketch.dtype != score.dtype:
        raise ValueError(f"{found} sketch.dtype {sketch.dtype} and score.dtype {score.dtype}. Set them to one value")
    if score.quantization is not None:
        raise ValueError(f"{found} score.quantization {score.quantization}, whose states are not those of the weights")
    if score.backend not in ("auto", "hidden_states"):
        raise ValueError(f"{found} score.backend {score.backend}, which has no states. Set auto or hidden_states")
    if needing and trainable != "head":
        raise ValueError(
            f"sweep.variants has {needing}, which need the gradients of all that trains (trainable: {trainable}), but "
            "sketch.source: engine has those of the output head alone. Set sketch.source: gradient"
        )


def load_params(file: Path, overrides: Sequence[str] = ()) -> Params:
    """The validated parameters of `file` with `overrides` ("section.key=value", values in YAML) applied.

    Raises RequestError for a missing file, broken YAML, an unknown key, a wrong type or a value out of range.
    """
    if not file.is_file():
        raise RequestError(f"{file} does not exist. Run from the project's folder, or name a file with --params.")
    try:
        raw = _parsed(file.read_text(encoding="utf-8"))
    except (_NoYaml, UnicodeDecodeError) as error:
        raise RequestError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise RequestError(f"{file} must hold sections (model, prepare, ...), found {type(raw).__name__}.")
    for override in overrides:
        _apply(raw, override)
    try:
        params = Params.model_validate(raw)
        for name in params.train.variants:
            variant_loop(params.train, name)
    except ValidationError as error:
        raise RequestError(_readable(file, error)) from None
    except ValueError as error:  # of a variant's settings
        raise RequestError(f"{file}: {error}") from None
    return params


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *parents, key = path.split(".")
    if not equals or not key:
        raise RequestError(f"--set {override!r}: expected section.key=value, for example train.learning_rate=1e-5")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RequestError(f"--set {override!r}: {parent} holds {child!r}, not a section")
        node = child
    try:
        node[key] = _parsed(text) if text else None
    except _NoYaml as error:
        found = " ".join(str(getattr(error.__cause__, "problem", None) or error).split())
        raise RequestError(
            f"--set {override!r}: {text!r} is not valid YAML ({found}); within {{}} a space follows each colon"
        ) from None


def _readable(file: Path, error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    lines = [f"{file} has {len(problems)} problem{'s' if len(problems) > 1 else ''}; nothing was run:"]
    for problem in problems:
        key = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {key}: unknown key (value {problem['input']!r}); misspelt?")
        elif problem["type"] == "missing":
            lines.append(f"  {key}: missing")
        elif problem["type"] == "value_error":
            lines.append(f"  {key}: {problem['ctx']['error']}")
        else:
            lines.append(f"  {key}: {problem['msg']}, found {problem['input']!r}")
    return "\n".join(lines)
