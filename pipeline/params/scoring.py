"""The sections `score`, `sketch` and `evaluate`: what is asked of the engine and of the gradient pass."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.params.ranges import Dtype, NonNegative, Positive, Section, Share
from pipeline.params.suites import SuiteParams


class RayParams(Section):
    """What one engine, or one rank, reserves of a node of the Ray cluster (docs/ray.md)."""

    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: NonNegative | None = None  # null: one, for an engine tensor_parallel_size, where the cluster has GPUs


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
    engines: Positive = 1  # of `score` and `sketch`, side by side, each on GPUs or cores of its own
    workers: Literal["local", "ray"] = "local"  # where they run: on this machine, or on a Ray cluster (docs/ray.md)
    ray: RayParams = RayParams()
    tensor_parallel_size: Positive = 1  # GPUs of one engine, for a model that one does not hold
    gpu_memory_utilization: Share = 0.9
    cpu_kv_cache_gib: Positive = 1  # of one engine
    enforce_eager: bool = False  # true: no compilation, slower on long runs, faster to start
    rows_per_call: Positive = 256  # rows handed to the engine, then journalled, at a time
    timeout_seconds: Positive = 1800  # without a sign of life from the engine; `score` then replaces it
    drift_sample: Positive = 64  # responses forwarded again by transformers in train.dtype

    @model_validator(mode="after")
    def gpus_hold_an_engine(self) -> Self:
        if self.ray.gpus and self.ray.gpus < self.tensor_parallel_size:
            raise ValueError(
                f"ray.gpus is {self.ray.gpus}, but an engine takes tensor_parallel_size of them, found "
                f"{self.tensor_parallel_size}. Set them to one value, or ray.gpus to null"
            )
        return self


class SketchParams(Section):
    """Gradient sketches of the training responses (docs/sketches.md).

    ranks, workers, ray, batch_tokens, activation_checkpointing: change no number, and mean nothing to the engine. k,
    audit: numbers per parameter group, and of the independent audit sketch. source: what takes the gradients: a
    backward pass over `trainable`, or the engine that scores, which has them for the output head alone.
    """

    mode: Literal["none", "tensorsketch", "exact"] = "none"
    source: Literal["gradient", "engine"] = "gradient"
    k: Annotated[int, Field(ge=2)] = 1024
    audit: Annotated[int, Field(ge=2)] = 256
    seed: NonNegative = 0  # of the hashes
    dtype: Dtype = "float32"
    ranks: Positive = 1  # GPUs, or CPU processes
    workers: Literal["local", "ray"] = "local"  # where they run: on this machine, or on a Ray cluster (docs/ray.md)
    ray: RayParams = RayParams()
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
    """What policies are compared on: held-out pairs, answers to held-out prompts, and benchmark tasks.

    tasks: names of tasks and groups of lm-evaluation-harness, folders of its YAML files, or such files; the five after
    it belong to them.
    """

    prompts: NonNegative = 64  # held-out prompts that the policy answers, for KL and reward; 0: none
    samples_per_prompt: Positive = 4
    max_new_tokens: Positive = 64
    seed: NonNegative = 0  # of answers; tasks that sample take it too
    suites: dict[str, SuiteParams] = Field(default_factory=dict)  # further pairs, by name
    suites_input: str = "data/input"  # folder of their files; DVC watches it
    tasks: list[str] = Field(default_factory=list)
    task_data: str | None = None  # folder of TASK.jsonl or TASK/SPLIT.jsonl (or .parquet); null: each task's dataset
    limit: Positive | None = None  # items of each task, the first ones; null: all
    fewshot: NonNegative | None = None  # examples before the question; null: the task's own number
    max_length: Positive | None = None  # tokens of context and answer; null: the model's positions
    apply_chat_template: bool = True  # where the tokenizer has one

    @field_validator("tasks")
    @classmethod
    def no_task_twice(cls, tasks: list[str]) -> list[str]:
        repeated = sorted({task for task in tasks if tasks.count(task) > 1})
        if repeated:
            raise ValueError(f"{repeated} stand there more than once")
        return tasks
