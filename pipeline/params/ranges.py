"""Ranges of hyper-parameters, and what all sections of params.yaml have in common."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

INFINITY = float("inf")


@dataclass(frozen=True)
class Interval:
    """The range of a number, whose error names the whole of it; also the text of docs/objectives.md."""

    low: float
    high: float
    ends: str = "()"

    def __str__(self) -> str:
        return f"{self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}".replace("inf", "∞")

    def __call__(self, value: float) -> float:
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        if not (above and below):  # NaN is refused too
            raise ValueError(f"must lie in {self}, found {value:g}")
        return value


Positive = Annotated[int, Field(ge=1)]

NonNegative = Annotated[int, Field(ge=0)]

Share = Annotated[float, Field(gt=0, le=1)]

Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
