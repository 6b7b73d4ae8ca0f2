"""The sections `sft`, `train` and `trainable`: the loop that both trainings share, and what trains in it."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.errors import RequestError
from pipeline.params.objectives import AnyVariant
from pipeline.params.ranges import Dtype, NonNegative, Positive, Section, Share


class LoopParams(Section):
    ranks: Positive = 1  # processes on this machine: GPUs, or CPU processes
    zero_stage: Literal[0, 1, 2, 3] = 0
    dtype: Dtype = "float32"
    epochs: Annotated[float, Field(ge=0)] = 1.0
    batch_size: Positive = 16  # examples (pairs, in train) per optimizer step, over all ranks
    micro_batch_size: Positive = 8  # of them in one forward on one rank
    batch_order: Literal["examples", "prompts"] = "examples"  # shuffled one by one, or with all pairs of a prompt
    tokens_per_batch: Positive | None = None  # of one forward on one rank, instead of micro_batch_size
    layout: Literal["auto", "shared_prompts", "packed", "padded"] = "auto"  # of a forward (pipeline/forward/layout.py)
    attention: Literal["auto", "sdpa", "flex"] = "auto"  # of the layouts without pads (pipeline/forward/kernels.py)
    layer_kernels: Literal["auto", "torch", "liger"] = "auto"  # norms, MLPs and rotary positions
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of the steps
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    activation_checkpointing: bool = False
    optimizer_offload: bool = False  # optimizer states in host memory; needs ZeRO 1 or higher
    logps_chunk_tokens: Positive | None = None  # response tokens whose logits exist at once; null: 64 MiB of logits
    checkpoint_every: Positive = 100  # optimizer steps
    keep_checkpoints: Positive = 2

    @model_validator(mode="after")
    def ranks_share_evenly(self) -> Self:
        if self.batch_size % self.ranks:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of ranks ({self.ranks})")
        if self.optimizer_offload and self.zero_stage == 0:
            raise ValueError("optimizer_offload needs zero_stage 1, 2 or 3")
        return self


class SftParams(LoopParams):
    """`epochs: 0` takes the model as it is."""

    seed: NonNegative = 0


class LastFraction(Section):
    last_fraction: Share  # of the transformer blocks, rounded up to whole blocks; embeddings and head stay frozen


class LoraShape(Section):
    r: Positive = 8
    alpha: Positive = 16
    # Names of layers, each of which must be there; or a group of the architecture's own (trainable/targets.py).
    targets: Literal["attention", "mlp", "all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    blocks: Literal["all", "last"] = "all"
    seed: NonNegative = 0


class Lora(Section):
    lora: LoraShape


Trainable = Literal["all", "last_block", "head"] | LastFraction | Lora


class TrainParams(LoopParams):
    evaluate_every: NonNegative = 0  # optimizer steps between measurements of held-out pairs; 0: none
    evaluate_pairs: Positive = 64  # of the test split, the same ones every time and for every variant
    log_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)  # beside history.tsv
    drift_tolerance: Annotated[float, Field(gt=0)] = 0.25  # nats per sequence, 99th percentile of the measured sample
    variants: dict[str, AnyVariant] = Field(min_length=1)

    @field_validator("variants")
    @classmethod
    def names_are_one_key_and_one_folder(cls, variants: dict[str, AnyVariant]) -> dict[str, AnyVariant]:
        """DVC reads a dot as nesting, a cell is called VARIANT-SEED, and some file systems know no capitals."""
        for name in variants:
            if not re.fullmatch(r"[A-Za-z0-9_]+", name):
                raise ValueError(
                    f"{name!r} can't be a variant's name; letters, digits and underscores are allowed (dpo_b0_2). In "
                    f"`dvc exp run -S train.variants.{name}...` and in DVC's stages it would name something else."
                )
        folded: dict[str, str] = {}
        for name in variants:
            if (other := folded.setdefault(name.casefold(), name)) != name:
                raise ValueError(f"{other!r} and {name!r} differ in capitals only; their results would be one folder")
        return variants

    @model_validator(mode="after")
    def epochs_train_something(self) -> Self:
        if self.epochs == 0:
            raise ValueError("train.epochs must be above 0")
        return self

    def variant(self, name: str) -> AnyVariant:
        """Raises RequestError for a name that is not among `variants`."""
        if name not in self.variants:
            raise RequestError(f"--variant {name!r} is not in train.variants, which has {sorted(self.variants)}.")
        return self.variants[name]


def variant_loop(train: TrainParams, name: str) -> TrainParams:
    """The `train` section with the variant's `settings` applied; unknown, out-of-range, unfit ones: ValueError.

    Raises RequestError for an unknown variant.
    """
    allowed = set(LoopParams.model_fields) | {"drift_tolerance"}
    variant = train.variant(name)
    settings = variant.settings
    foreign = sorted(set(settings) - allowed)
    if foreign:
        raise ValueError(f"train.variants.{name}.settings: unknown {foreign}; allowed are {sorted(allowed)}")
    try:
        loop = TrainParams.model_validate(train.model_dump() | settings)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}, found {p['input']!r}" for p in error.errors()]
        raise ValueError(f"train.variants.{name}.settings: {'; '.join(problems)}") from None
    micro = loop.micro_batch_size if loop.tokens_per_batch is None else 0
    if variant.needs_whole_batch and (loop.ranks > 1 or micro < loop.batch_size):
        raise ValueError(
            f"train.variants.{name}: {variant.objective} looks across the batch, so the batch must be one "
            f"micro-batch on one rank; found batch_size {loop.batch_size}, micro_batch_size "
            f"{loop.micro_batch_size}, tokens_per_batch {loop.tokens_per_batch}, ranks {loop.ranks}. Set "
            "them (tokens_per_batch: null) in the variant's settings"
        )
    return loop
