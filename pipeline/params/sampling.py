"""The section `sample`: answers sampled from the reference for train prompts, how they are scored and paired."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.params.ranges import NonNegative, Positive, Section, Share

ScorerName = Literal["none", "math", "exact", "regex", "reward_model", "function"]
PairRule = Literal["max_min", "best_vs_random", "all"]
_ENTRY_POINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class SampleParams(Section):
    """`scorer: none` turns the stage off. max_new_tokens: tokens; min_gap: in the scorer's own units.

    `pattern`, `function` and `reward_model` may stay when another scorer is chosen.
    """

    scorer: ScorerName = "none"
    n: Annotated[int, Field(ge=2)] = 8  # answers a prompt
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.8
    top_p: Share = 0.95
    max_new_tokens: Positive = 256
    seed: NonNegative = 0
    prompts: NonNegative | None = None  # at most so many of the train prompts; null: all
    # Of rows with prompt and answer; empty: the prompts of the prepared pairs, whose chosen response is the answer.
    files: list[str] = Field(default_factory=list)
    pairs: PairRule = "max_min"
    min_gap: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # answers no further apart make no pair
    pattern: str | None = None  # regular expression whose one group is the answer, for scorer: regex
    function: str | None = None  # package.module:name, for scorer: function
    reward_model: str | None = None  # folder, for scorer: reward_model

    @field_validator("pattern")
    @classmethod
    def one_group(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        if groups != 1:
            raise ValueError(
                f"must have exactly one group, around the answer, found {groups} in {pattern!r}; other parentheses can "
                "be (?:...)"
            )
        return pattern

    @field_validator("function")
    @classmethod
    def names_a_function(cls, function: str | None) -> str | None:
        if function is not None and not _ENTRY_POINT.fullmatch(function):
            raise ValueError(f"must be package.module:name, as in my_package.rewards:score, found {function!r}")
        return function

    @model_validator(mode="after")
    def scorer_is_described(self) -> Self:
        needed = {
            "regex": ("pattern", self.pattern, "a regular expression with one group, which finds the answer in a text"),
            "function": ("function", self.function, "package.module:name of a Python function"),
            "reward_model": ("reward_model", self.reward_model, "the folder of a reward model"),
        }
        if self.scorer in needed:
            key, value, meaning = needed[self.scorer]
            if not value:
                raise ValueError(f"scorer: {self.scorer} needs sample.{key} ({meaning}), found {value!r}")
        return self
