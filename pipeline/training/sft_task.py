"""The ranks' side of supervised fine-tuning: data, model and loss for pipeline/training/loop.py."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline.forward.kernels import choose_kernels
from pipeline.forward.layout import choose_layout
from pipeline.forward.logps import ResponseLogps, collate, pack
from pipeline.model.opening import is_multimodal, open_config, require_whole
from pipeline.model.parts import causal_model
from pipeline.model.tokenizer import open_prepared_tokenizer
from pipeline.params import LoopParams, ModelParams
from pipeline.tokens.supervised import Supervised
from pipeline.trainable.initial import initial_model
from pipeline.training.deepspeed_engine import Engine, divided_from_the_start
from pipeline.training.job import Job
from pipeline.training.loop import TrainingRun, micro_steps_for


class SftTask:
    """Cross-entropy of the completion tokens, averaged over all completion tokens of the batch."""

    def __init__(self, rows: Path, tokens: Supervised, layout: str, kernels: dict[str, str]) -> None:
        """rows: where people find what `tokens` were made of, for messages. layout: "padded", or anything else for one
        run of sequences. kernels: which ones train, for the metrics."""
        self.layout, self.kernels, self.rows, self._tokens = layout, kernels, rows, tokens
        self.response_lengths = tokens.lengths(1).astype(np.int64)
        self.lengths = self.response_lengths + tokens.lengths(0)
        self.groups = np.arange(len(tokens))

    def tokens(self, examples: np.ndarray) -> int:
        lengths = self.lengths[examples]
        return int(lengths.max() * len(lengths) if self.layout == "padded" else lengths.sum())

    def loss(self, engine: Engine, micro: np.ndarray, batch: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        sequences = self._tokens.sequences(micro)
        tokens = collate(sequences) if self.layout == "padded" else pack(sequences, np.arange(len(micro)))
        nll = -engine(*tokens.to(engine.device)).sum()
        return nll / float(self.response_lengths[batch].sum()), {"nll": nll}

    def names(self, examples: np.ndarray) -> list[str]:
        return [f"row {row} of {self.rows}" for row in examples.tolist()]

    def summarise(self, sums: dict[str, float], batch: np.ndarray) -> dict[str, float]:
        return {"loss": sums["nll"] / float(self.response_lengths[batch].sum())}


def _is_multimodal(params: ModelParams) -> bool:
    assert params.name is not None  # asked where nothing is from scratch
    config = open_config(params.name, revision=params.revision, trust_remote_code=params.trust_remote_code)
    return is_multimodal(config)


def start(job: Job, loop: LoopParams) -> TrainingRun:
    """One rank's share; prepare keeps no sft rows back, so nothing is held out."""
    params = ModelParams.model_validate(job.settings["model"])
    tokenizer = open_prepared_tokenizer(Path(job.paths["tokenizer"]), trust_remote_code=params.trust_remote_code)
    # Adapters are merged into whole weights, random ones are drawn in the same order whatever the ranks, and a text
    # part is compared with its whole.
    whole = params.adapter is not None or params.scratch is not None or _is_multimodal(params)
    if loop.zero_stage == 3 and params.name is not None and not whole:
        require_whole(params.name, revision=params.revision, trust_remote_code=params.trust_remote_code)
    with nullcontext() if whole else divided_from_the_start(loop, micro_steps=micro_steps_for(loop)):
        model = initial_model(params, tokenizer)
    if loop.activation_checkpointing:
        causal_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    layout = choose_layout(model, loop.layout, best="packed")
    kernels = choose_kernels(model, layout, loop)
    model.train()
    engine = Engine(ResponseLogps(model, loop.logps_chunk_tokens), loop, micro_steps=micro_steps_for(loop))
    tokens = Supervised(Path(job.paths["tokens"]))
    return TrainingRun(engine, SftTask(Path(job.paths["sft"]), tokens, layout, kernels), model)
