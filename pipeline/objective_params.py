"""Hyper-parameters of every preference objective with their ranges; no torch, so that every command may read them.

The fields of a class below, less `objective` and `settings`, are the keyword arguments of the function of the same
name in pipeline/objectives.py (a test keeps the two in step).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Variant(BaseModel):
    """One policy to train: an objective, its hyper-parameters, and `settings` that override the `train` section."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    settings: dict[str, Any] = Field(default_factory=dict)

    def hyperparameters(self) -> dict[str, float]:
        return self.model_dump(exclude={"objective", "settings"})


class DPO(Variant):
    objective: Literal["dpo"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0


class BDPO(Variant):
    objective: Literal["bdpo"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    mixture: Annotated[float, Field(gt=0, lt=1)] = 0.5


AnyVariant = Annotated[DPO | BDPO, Field(discriminator="objective")]
