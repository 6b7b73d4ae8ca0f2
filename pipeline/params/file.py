"""The sections of params.yaml as strict models. A stage receives its own section, never the whole file.

Strict means: an unknown key, a wrong type or a value out of range is an error that names the key. Nothing here imports
an engine, so every command can validate in milliseconds.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import RequestError
from pipeline.params.objectives import AnyVariant

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# model: the reference, which is also where every policy starts --------------------------------------------------------


class ScratchModel(Section):
    """A model built from a config with random weights: any causal architecture that transformers knows."""

    architecture: str = "qwen2"  # transformers' model_type
    vocabulary_size: Annotated[int, Field(ge=261)] = 1024  # of the BPE trained on the sft rows; 261: bytes and specials
    config: dict[str, Any] = Field(default_factory=dict)  # passed to the architecture's config class
    seed: NonNegative = 0


class ModelParams(Section):
    """Either `name` (hub id or local folder) or `scratch`; `adapter`: a LoRA of `name` to merge into it."""

    name: str | None = None
    revision: str | None = None
    adapter: str | None = None  # peft adapter, local folder or hub id; the reference is the merged model
    trust_remote_code: bool = False
    scratch: ScratchModel | None = None

    @model_validator(mode="after")
    def one_origin(self) -> Self:
        if (self.name is None) == (self.scratch is None):
            raise ValueError("give either model.name (hub id or local folder) or model.scratch, and null for the other")
        if self.adapter is not None and self.name is None:
            raise ValueError("model.adapter belongs to model.name; a model from scratch has none")
        return self


# prepare --------------------------------------------------------------------------------------------------------------


class DemoParams(Section):
    prompts: Positive = 400  # distinct prompts with pairs
    sft_rows: Positive = 3000
    seed: NonNegative = 0


class FilesParams(Section):
    """File names relative to prepare.input; .jsonl or .parquet. `test_pairs` empty: split `pairs` by prompt."""

    pairs: list[str] = Field(min_length=1)
    test_pairs: list[str] = Field(default_factory=list)


class HubParams(Section):
    """A dataset on the hub, or a local folder that `datasets` can load. `test_split` null: split by prompt."""

    dataset: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    test_split: str | None = None


class SftRowsParams(Section):
    """Where the sft rows come from: `files` of prompt and completion, or the chosen responses of a share of the pairs.

    `pairs_files` limits the second form to some of the pair files (empty: the first one), so that pair files added
    later leave the sft rows, hence the reference, untouched. `source: none` writes no rows (for sft.epochs: 0).
    """

    source: Literal["files", "pairs", "demo", "none"] = "demo"
    files: list[str] = Field(default_factory=list)
    pairs_share: Share = 1.0
    pairs_files: list[str] = Field(default_factory=list)


class ColumnNames(Section):
    """Column names in the input. `category` and the rewards are optional; a missing `prompt` means implicit prompts."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    category: str = "category"
    chosen_reward: str = "chosen_reward"
    rejected_reward: str = "rejected_reward"


class PrepareParams(Section):
    source: Literal["demo", "files", "hub"] = "demo"
    input: str = "data/input"  # folder of the files; DVC watches it
    demo: DemoParams = DemoParams()
    files: FilesParams | None = None
    hub: HubParams | None = None
    columns: ColumnNames = ColumnNames()
    sft: SftRowsParams = SftRowsParams()
    chat_template: Literal["auto", "never"] | str = "auto"  # or a path to a jinja file
    max_tokens: Positive = 1024  # prompt and response together; responses keep their start
    max_prompt_tokens: Positive = 512
    long_prompts: Literal["drop", "truncate_left"] = "drop"
    test_share: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of the prompts, where no test file or split is given
    split_seed: NonNegative = 0
    on_bad_row: Literal["fail", "skip"] = "fail"

    @model_validator(mode="after")
    def source_is_described(self) -> Self:
        if self.source == "files" and self.files is None:
            raise ValueError("source: files needs prepare.files.pairs (a list of file names under prepare.input)")
        if self.source == "hub" and self.hub is None:
            raise ValueError("source: hub needs prepare.hub.dataset")
        if self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(
                f"max_prompt_tokens ({self.max_prompt_tokens}) must be below max_tokens ({self.max_tokens})"
            )
        if self.sft.source == "files" and not self.sft.files:
            raise ValueError("sft.source: files needs prepare.sft.files (file names under prepare.input)")
        if self.sft.source == "demo" and self.source != "demo":
            raise ValueError("sft.source: demo goes with source: demo; choose files, pairs or none")
        pairs_files = self.files.pairs if self.source == "files" and self.files else []
        foreign = [name for name in self.sft.pairs_files if name not in pairs_files]
        if self.sft.source == "pairs" and foreign:
            raise ValueError(f"sft.pairs_files names {foreign}, which are not among prepare.files.pairs {pairs_files}")
        return self


# training: what sft and train share ----------------------------------------------------------------------------------


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
    targets: list[str] = Field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)
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
    variants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")], AnyVariant] = Field(min_length=1)

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


# scoring and evaluation -----------------------------------------------------------------------------------------------


class ScoreParams(Section):
    """The vLLM engine, for the reference and, in evaluate, policies; of these, dtype and quantization are identity."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: str | None = None
    # How log-probs are read from vLLM (docs/performance.md); auto: the fastest that gives the right ones at start-up.
    backend: Literal["auto", "token_ids", "hidden_states", "prompt_logprobs"] = "auto"
    block_size: Positive | None = None  # tokens; prompts are shared in whole blocks. null: 32 on CPU, vLLM's own else
    max_model_len: Positive | None = None  # tokens; null: as long as the longest row needs
    max_num_seqs: Positive = 64
    max_num_batched_tokens: Positive = 2048
    tensor_parallel_size: Positive = 1
    gpu_memory_utilization: Share = 0.9
    cpu_kv_cache_gib: Positive = 1
    enforce_eager: bool = False  # true: no compilation, slower on long runs, faster to start
    rows_per_call: Positive = 256  # rows handed to the engine, then journalled, at a time
    timeout_seconds: Positive = 1800  # without a sign of life from the engine; `score` then replaces it
    drift_sample: Positive = 64  # responses forwarded again by transformers in train.dtype


class SketchParams(Section):
    """Gradient sketches of the training responses (docs/sketches.md).

    ranks, batch_tokens, activation_checkpointing: change no number, and mean nothing to the engine. k, audit: numbers
    per parameter group, and of the independent audit sketch. source: what takes the gradients: a backward pass over
    `trainable`, or the engine that scores, which has them for the output head alone.
    """

    mode: Literal["none", "tensorsketch", "exact"] = "none"
    source: Literal["gradient", "engine"] = "gradient"
    k: Annotated[int, Field(ge=2)] = 1024
    audit: Annotated[int, Field(ge=2)] = 256
    seed: NonNegative = 0  # of the hashes
    dtype: Dtype = "float32"
    ranks: Positive = 1  # processes on this machine: GPUs, or CPU processes
    batch_tokens: Positive = 4096  # of prompts and responses, padding included, in one backward
    activation_checkpointing: bool = False

    @property
    def by_engine(self) -> bool:
        return self.mode != "none" and self.source == "engine"

    @model_validator(mode="after")
    def engine_sketches(self) -> Self:
        if self.by_engine and self.mode == "exact":
            raise ValueError("source: engine needs mode: tensorsketch; an exact head is as large as the vocabulary")
        return self


class EvaluateParams(Section):
    prompts: NonNegative = 64  # held-out prompts that the policy answers, for KL and reward; 0: none
    samples_per_prompt: Positive = 4
    max_new_tokens: Positive = 64
    seed: NonNegative = 0


class SweepParams(Section):
    variants: list[str] = Field(min_length=1)
    seeds: list[NonNegative] = Field(min_length=1)


class Params(Section):
    """The whole file; stages read it only to pick their own section."""

    model: ModelParams
    prepare: PrepareParams
    sft: SftParams
    score: ScoreParams
    sketch: SketchParams = SketchParams()
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
        if self.prepare.sft.source == "none" and self.sft.epochs > 0:
            raise ValueError("prepare.sft.source: none leaves nothing to train on; set sft.epochs: 0")
        if self.model.scratch is not None and self.sft.epochs == 0:
            raise ValueError("model.scratch has random weights; set sft.epochs above 0 or give model.name")
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
            f"train.variants.{name}: {variant.objective} compares pairs across the batch, so the batch must be one "
            f"micro-batch on one rank; found batch_size {loop.batch_size}, micro_batch_size "
            f"{loop.micro_batch_size}, tokens_per_batch {loop.tokens_per_batch}, ranks {loop.ranks}. Set "
            "them (tokens_per_batch: null) in the variant's settings"
        )
    return loop
