"""A reference model made ready for sketching: what trains, in which groups, and the identity of its sketches."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import nn

from cache import SketchIdentity
from cache.sketches import canonical_json
from pipeline.errors import RequestError
from pipeline.forward.logps import Tokens
from pipeline.forward.steadiness import require_steady
from pipeline.model.digests import config_digest, weights_digest
from pipeline.model.opening import open_model
from pipeline.model.parts import causal_model, disable_dropout
from pipeline.params import SketchParams, Trainable
from pipeline.sketches.collector import GradientCollector, Sketched
from pipeline.sketches.groups import TrainedParts, find_trained
from pipeline.sketches.hashes import AUDIT, HASH_VERSION, SKETCH, hashes
from pipeline.sketches.sums import ExactSums, Sums, TensorSketchSums, exact_widths
from pipeline.trainable.selection import adapter_digest, select_trainable

LARGEST_EXACT = 1 << 18  # numbers a response; half a megabyte of float16


class Sketcher:
    """`model` with what trains chosen; a context manager in which it sketches batches.

    model: a transformers causal LM without adapter, on its device. Raises RequestError where `trainable` does not fit
    the model, where its modules can't be sketched, and for exact gradients of more than LARGEST_EXACT numbers.
    """

    def __init__(self, model: nn.Module, params: SketchParams, trainable: Trainable) -> None:
        self.params, self.trainable = params, trainable
        self.model = disable_dropout(select_trainable(model, trainable)).eval()
        self.parts = find_trained(self.model)
        self.exact = _exact_shapes(self.parts) if params.mode == "exact" else None
        if params.activation_checkpointing:
            causal_model(self.model).gradient_checkpointing_enable({"use_reentrant": False})
            require_steady(self.model)
            self.model.train()  # transformers checkpoints in training mode only
        self.widths = dict.fromkeys(self.parts.groups.values(), params.k)
        if self.exact is not None:
            self.widths = exact_widths(self.parts.groups, self.exact)
            if sum(self.widths.values()) > LARGEST_EXACT:
                raise RequestError(
                    f"sketch.mode: exact would store {sum(self.widths.values()):,} numbers a response, at most "
                    f"{LARGEST_EXACT:,} are allowed. Set sketch.mode: tensorsketch, or a smaller `trainable`."
                )
        device = next(self.model.parameters()).device
        make_hashes = partial(hashes, seed=params.seed, device=device)
        self._hashes = {SKETCH: make_hashes(params.k, purpose=SKETCH), AUDIT: make_hashes(params.audit, purpose=AUDIT)}
        self._collector = GradientCollector(self.model, self._sums, self.parts)
        self._device = device

    def identity(self, folder: Path) -> SketchIdentity:
        """Whose sketches these are, for the model in `folder`: its weights are read once more to be digested."""
        exact = self.exact is not None
        trainable = self.trainable if isinstance(self.trainable, str) else self.trainable.model_dump()
        return SketchIdentity(
            weights=weights_digest(folder),
            config=config_digest(folder),
            trainable=canonical_json(trainable),
            adapter_init=adapter_digest(self.model),
            mode=self.params.mode,
            k=None if exact else self.params.k,
            audit=self.params.audit,
            seed=self.params.seed,
            hash_version=HASH_VERSION,
            dtype=self.params.dtype,
            groups=canonical_json(self.widths),
        )

    def __enter__(self) -> Self:
        self._collector.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._collector.__exit__(kind, error, at)

    def __call__(self, sequences: Sequence[tuple[Tokens, Tokens]]) -> Sketched:
        """Sketch (prompt ids, response ids), in order; see GradientCollector."""
        return self._collector(sequences)

    def _sums(self, n: int) -> list[Sums]:
        groups, device = self.parts.groups, self._device
        audit = TensorSketchSums(dict.fromkeys(groups, AUDIT), self.params.audit, self._hashes[AUDIT], n, device)
        if self.exact is not None:
            return [ExactSums(groups, self.exact, n, device), audit]
        return [TensorSketchSums(groups, self.params.k, self._hashes[SKETCH], n, device), audit]


def load_sketcher(
    folder: Path, params: SketchParams, trainable: Trainable, *, trust_remote_code: bool = False, rank: int = 0
) -> Sketcher:
    """A Sketcher of the transformers model in `folder`, on GPU number `rank` where there are any."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    model: nn.Module = open_model(folder, dtype=getattr(torch, params.dtype), trust_remote_code=trust_remote_code)
    return Sketcher(model.to(device), params, trainable)


def _exact_shapes(parts: TrainedParts) -> dict[str, torch.Size]:
    """Shapes of the parameters that have a gradient: while a LoRA's B is zero, its A has none."""
    zero = {n.replace(".lora_B.", ".lora_A.") for n, p in parts.parameters.items() if ".lora_B." in n and not p.any()}
    return {name: parameter.shape for name, parameter in parts.parameters.items() if name not in zero}
