"""What training will hold in memory on each rank, by part, found without allocating any of it.

Activations come from a forward pass over fake tensors, which have shapes but no data: what autograd would keep is
counted tensor by tensor, whatever the architecture. The rest is arithmetic on parameter counts (Rajbhandari et al.
2020, ZeRO, table 1: which stage divides what among ranks).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.auxdpo.rank_share import planned_bytes
from pipeline.forward.head import ChunkedHead
from pipeline.forward.layout import ATTENTION
from pipeline.forward.logps import ResponseLogps, TokenBatch
from pipeline.model.opening import model_of_config
from pipeline.model.parts import causal_model, text_config
from pipeline.params import AnyVariant, AuxDPO, LoopParams, Trainable
from pipeline.tokens.examples import open_examples
from pipeline.trainable.selection import select_trainable
from pipeline.training.batches import batch_indices, micro_batches, steps_for
from pipeline.training.pairs import PairBatches

# Python with PyTorch, transformers and DeepSpeed loaded, on a CPU; CUDA's context and kernels are about as large.
PROGRAM_BYTES = 620 << 20
# The stage that waits for the ranks: Python with polars and pyarrow.
STAGE_BYTES = 150 << 20
# Batches that are looked at for the largest micro-batch.
_STEPS = 200


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank. parts: name -> bytes, adding up to the peak; reference: what a reference model would add."""

    parts: dict[str, int]
    parameters: int
    trained: int
    micro_batch_tokens: int
    layout: str
    reference: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def plan_memory(
    model: Path,
    pairs: Path,
    loop: LoopParams,
    trainable: Trainable,
    *,
    objective: AnyVariant | None = None,
    sketches: Path | None = None,
    trust_remote_code: bool = False,
) -> MemoryPlan:
    """model: a transformers folder, of which only the config is read. layout: auto counts as shared prompts.

    objective, sketches: for AuxDPO, whose offsets are counted too. Raises RequestError, CacheError or CacheIncomplete
    where it lacks its sketches.
    """
    layout = "shared_prompts" if loop.layout == "auto" else loop.layout
    feedback = objective is not None and objective.reads_feedback
    batches = PairBatches(open_examples(pairs, "train", feedback=feedback), layout)
    micro = _largest_micro_batch(batches, loop)
    with torch.device("meta"):  # peft knows this device, and not fake tensors
        policy: Any = model_of_config(model, dtype=getattr(torch, loop.dtype), trust_remote_code=trust_remote_code)
        if layout != "padded":
            policy.set_attn_implementation(ATTENTION)
        policy = select_trainable(policy, trainable)
    sizes = _Sizes(policy)
    tokens, _ = batches.batch(micro)
    with FakeTensorMode(allow_non_fake_inputs=True), _overwriting():
        # Fake tensors have the CPU's kernels, with what these keep; meta tensors would take the plainest ones.
        logps = ResponseLogps(policy.to_empty(device="cpu").train(), loop.logps_chunk_tokens)
        activations = _activations(logps, tokens, checkpointing=loop.activation_checkpointing)
    parts = _states(sizes, loop) | {
        "activations": activations,
        "logits": _logits(logps.head, len(tokens.targets)),
    }
    if isinstance(objective, AuxDPO):
        parts |= planned_bytes(sketches, batches.examples.key_table, objective, loop.ranks)
    parts["program"] = PROGRAM_BYTES
    return MemoryPlan(
        parts=parts,
        parameters=sizes.all,
        trained=sizes.trained,
        micro_batch_tokens=batches.tokens(micro),
        layout=layout,
        reference=sizes.all * sizes.bytes // (loop.ranks if loop.zero_stage == 3 else 1),
    )


@contextmanager
def _overwriting() -> Iterator[None]:
    """Modules take new parameters when they move, since a fake tensor can't take a meta tensor's place."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


class _Sizes:
    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())  # tied ones once
        self.all = sum(p.numel() for p in parameters)
        self.trained = sum(p.numel() for p in parameters if p.requires_grad)
        self.bytes = parameters[0].dtype.itemsize
        inner = causal_model(model)
        output, embedding = inner.get_output_embeddings().weight, inner.get_input_embeddings().weight
        self.tied = output is embedding
        self.output, self.embedding = (int(w.numel()) if w.requires_grad else 0 for w in (output, embedding))


def _states(sizes: _Sizes, loop: LoopParams) -> dict[str, int]:
    """Weights, gradients and Adam's two moments; its update needs nothing beside them."""
    ranks, stage = loop.ranks, loop.zero_stage
    half = loop.dtype == "bfloat16"
    if half:
        stage = max(1, stage)  # as the engine does
    # Master weights: beside bf16 ones, and in ZeRO's flat partitions also beside float32 ones.
    master = 4 * sizes.trained // ranks if stage else 0
    # In bf16 gradients are accumulated in float32.
    gradients = 4 * sizes.trained // (ranks if stage >= 2 else 1) + _new_gradients(sizes, plain=not stage)
    offloaded = loop.optimizer_offload and torch.cuda.is_available()
    moments = 0 if offloaded else 8 * sizes.trained // (ranks if stage else 1)
    return {
        "weights": sizes.all * sizes.bytes // (ranks if stage == 3 else 1),
        "master weights": master,
        "gradients": gradients,
        "optimizer": moments,
    }


def _new_gradients(sizes: _Sizes, *, plain: bool) -> int:
    """Bytes of the vocabulary's gradients on their way to what is accumulated; tied ones come from two places.

    plain: as ResponseLogps.accumulate_in_place has it, where only embeddings of their own, or on a GPU, make an array.
    """
    if plain:
        return sizes.bytes * (0 if sizes.tied and not torch.cuda.is_available() else sizes.embedding)
    return sizes.bytes * sizes.output * (2 if sizes.tied else 1)


def _logits(head: ChunkedHead, tokens: int) -> int:
    chunk = min(head.chunk_tokens, tokens) * len(head.weight)
    arrays = 1 if head.softcap is None else 2
    return chunk * (4 * arrays + (0 if head.weight.dtype.itemsize == 4 else head.weight.dtype.itemsize))


def _largest_micro_batch(batches: PairBatches, loop: LoopParams) -> np.ndarray:
    steps = min(_STEPS, steps_for(loop.epochs, len(batches), loop.batch_size))
    groups = batches.groups if loop.batch_order == "prompts" else None
    micros = []
    for step in range(steps):
        batch = batch_indices(step, seed=0, n_examples=len(batches), batch_size=loop.batch_size, groups=groups)
        micros += micro_batches(
            batch,
            batches.groups,
            batches.tokens,
            rank=0,
            ranks=loop.ranks,
            micro_batch_size=loop.micro_batch_size,
            tokens_per_batch=loop.tokens_per_batch,
        )
    return max(micros, key=batches.tokens)


def _activations(logps: ResponseLogps, tokens: TokenBatch, *, checkpointing: bool) -> int:
    """Bytes that autograd keeps of one forward; with checkpointing, each block's input and one block's inside."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in logps.parameters()}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def same(tensor: Any) -> Any:
        return tensor

    alive = []  # a freed storage's address would be used again
    with torch.autograd.graph.saved_tensors_hooks(count, same):
        alive.append(logps(*tokens))
    whole = sum(kept.values())
    if not checkpointing:
        return whole
    config = text_config(logps.model)
    inputs: int = tokens.input_ids.numel() * config.hidden_size * logps.head.weight.dtype.itemsize
    layers: int = config.num_hidden_layers
    return inputs * layers + whole // layers
