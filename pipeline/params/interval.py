"""Ranges of hyper-parameters."""

from dataclasses import dataclass

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
