"""One backward for a whole batch, from which every example's gradient sketch falls out.

The trainable layers are given a forward whose backward hands the pieces of each example's gradient to a collector and
returns none for the parameter itself. So nothing below the lowest trainable layer builds a graph, no parameter's
gradient is ever summed over the batch, and examples are kept apart by the first axis of every activation.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import RequestError, RunFailed
from pipeline.forward.head import ChunkedHead
from pipeline.forward.logps import TokenBatch, Tokens, collate
from pipeline.model.parts import causal_model
from pipeline.sketches.groups import Layer, TrainedParts, find_trained
from pipeline.sketches.head import log_prob_gradient
from pipeline.sketches.sums import CHUNK_NUMBERS, Sums, by_tokens_is_cheaper, lookup_squared_norm, squared_norms


class Sketched(NamedTuple):
    """Sketches of n responses.

    values: (n, width) by group; audit: (n, audit width); grad_norm: (n,), of the exact gradient;
    sum_logp: (n,) float64, nats, of the same forward. All on the CPU; float32 where nothing else is said.
    """

    values: dict[str, Tensor]
    audit: Tensor
    grad_norm: Tensor
    sum_logp: Tensor


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, record: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.record = record
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.record(delta, x)
        return delta @ weight if ctx.needs_input_grad[0] else None, None, None, None


class _Observed(torch.autograd.Function):
    """`value`, as if it depended on `parameter`; `record` is called with its gradient, the parameter gets none."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor, record: Callable[[Tensor], None]) -> Tensor:
        ctx.record = record
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.record(gradient)
        return None, None, None


_observe: Callable[[Tensor, Tensor, Callable[[Tensor], None]], Tensor] = _Observed.apply


class GradientCollector:
    """Takes apart, by example, the gradient of each response's summed log-prob; a context manager.

    model: a transformers causal LM in which select_trainable has chosen what trains; inside the context its trainable
    layers must not be used otherwise. make_sums: n -> the accumulators of one batch (see sums.py), the audit's
    last. Raises RequestError for modules that can't be sketched.
    """

    def __init__(
        self, model: nn.Module, make_sums: Callable[[int], list[Sums]], parts: TrainedParts | None = None
    ) -> None:
        self.model, self.make_sums = model, make_sums
        self.parts = parts or find_trained(model)
        try:
            self.head = ChunkedHead(model, 1)  # for what it knows of the head: scale and soft cap
        except ValueError as error:
            raise RequestError(f"sketch: {error}") from None
        self.n = 0
        self.ids = torch.empty(0)
        self.sums: list[Sums] = []
        self.visits: Counter[str] = Counter()
        self.squared = torch.empty(0)
        self._crossed: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Self:
        for layer in self.parts.layers:
            layer.module.forward = _forward_of(layer, self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for layer in self.parts.layers:
            del layer.module.forward  # the class's own is behind it

    def __call__(self, sequences: Sequence[tuple[Tokens, Tokens]]) -> Sketched:
        """Sketch (prompt ids, response ids) of every sequence, in order. Raises RunFailed for what is not finite."""
        device = self.head.weight.device
        batch = collate(sequences).to(device)
        self.n, self.ids, self.sums = len(sequences), batch.input_ids, self.make_sums(len(sequences))
        self.visits, self._crossed = Counter(), []
        self.squared = torch.zeros(self.n, dtype=torch.float64, device=device)
        decoder = causal_model(self.model).base_model
        hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        sum_logp, gradient = self._head(hidden.detach(), batch)
        if hidden.requires_grad:
            hidden.backward(gradient)
        self._check(hidden)
        values, audit = ({group: v.cpu() for group, v in sums.result().items()} for sums in self.sums)
        norms = self.squared.clamp(min=0).sqrt().float().cpu()
        (audited,) = audit.values()
        return Sketched(values, audited, norms, sum_logp.cpu())

    def _check(self, hidden: Tensor) -> None:
        wrong = [name for name, p in self.parts.parameters.items() if p.grad is not None]
        for parameter in self.parts.parameters.values():
            parameter.grad = None
        for name in self.parts.parameters:
            if self.visits[name] != 1 + (name == self.parts.tied):
                wrong.append(name)
        if wrong:
            raise RunFailed(
                f"{type(causal_model(self.model)).__name__} uses {', '.join(sorted(set(wrong))[:5])} in a way that "
                "sketches can't follow (not once per forward, or past its own module). Choose a `trainable` without it."
            )
        if not torch.isfinite(self.squared).all():
            raise RunFailed("A gradient is not finite. Set sketch.dtype to float32, or choose another model.")

    def _head(self, hidden: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Sum log-probs (n,) and the gradient of `hidden` (n, L, width), example by example.

        One example's logits, (response tokens, vocabulary), exist at once.
        """
        head, names = self.head, self.parts.head
        sums = torch.zeros(self.n, dtype=torch.float64, device=hidden.device)
        gradient = torch.zeros_like(hidden)
        for row in range(self.n):
            mine = batch.rows == row
            positions, targets = batch.places[mine] - row * batch.input_ids.shape[1], batch.targets[mine]
            inputs = hidden[row, positions]
            with torch.no_grad():
                logps, delta = log_prob_gradient(head, inputs, targets)
                sums[row] = logps.sum(dtype=torch.float64)
                gradient[row, positions] = delta.to(inputs.dtype) @ head.weight
                if "bias" in names:
                    self._bias(names["bias"], delta.sum(dim=0)[None], slice(row, row + 1))
                if "weight" in names:
                    self._outer(names["weight"], delta[None], inputs.float()[None], row)
                if self.parts.tied is not None:
                    self._crossed.append((delta[:, batch.input_ids[row]], inputs.float()))
        self.visits.update(names.values())
        return sums, gradient

    def linear(self, layer: Layer, delta: Tensor, x: Tensor) -> None:
        """delta: (n, T, out), x: (n, T, in)."""
        if x.dim() != 3 or len(x) != self.n:
            raise self.refusal(layer.module, x)
        delta, x = delta.float(), x.float()
        if "bias" in layer.names:
            self.vector(layer.names["bias"], delta.sum(dim=1))
        if "weight" in layer.names:
            self._outer(layer.names["weight"], delta, x, 0)
            self.visits[layer.names["weight"]] += 1

    def _outer(self, name: str, delta: Tensor, x: Tensor, first: int) -> None:
        n_out, n_in = delta.shape[-1], x.shape[-1]
        everyone = slice(first, first + len(delta))
        sizes = [sums.k for sums in self.sums if sums.k is not None]
        if len(sizes) == len(self.sums) and by_tokens_is_cheaper(delta.shape[1], n_out, n_in, sizes):
            self.squared[everyone] += squared_norms(delta, x)
            for sums in self.sums:
                sums.outer(name, delta, x, everyone)
            return
        step = max(1, CHUNK_NUMBERS // (n_out * n_in))
        for start in range(0, len(delta), step):
            part = slice(start, min(start + step, len(delta)))
            rows = slice(first + part.start, first + part.stop)
            gradients = torch.bmm(delta[part].transpose(1, 2), x[part])
            flat = gradients.flatten(1)
            self.squared[rows] += torch.linalg.vecdot(flat, flat)
            for sums in self.sums:
                sums.matrix(name, gradients, rows)

    def _bias(self, name: str, gradients: Tensor, rows: slice) -> None:
        padded = gradients.new_zeros(self.n, gradients.shape[-1])
        padded[rows] = gradients
        self._add_vector(name, padded)

    def vector(self, name: str, gradients: Tensor) -> None:
        """gradients: (n, size)."""
        self._add_vector(name, gradients.float())
        self.visits[name] += 1

    def _add_vector(self, name: str, gradients: Tensor) -> None:
        self.squared += gradients.square().sum(dim=1, dtype=torch.float64)
        for sums in self.sums:
            sums.vector(name, gradients)

    def embedding(self, layer: Layer, ids: Tensor, delta: Tensor) -> None:
        """ids: (n, T); delta: (n, T, width), the gradient of the rows that were looked up."""
        name, module = layer.names["weight"], layer.module
        assert isinstance(module, nn.Embedding)
        delta = delta.float()
        if module.padding_idx is not None:  # torch gives that row no gradient
            delta = delta * ids.ne(module.padding_idx)[..., None]
        for row in range(self.n):
            self.squared[row] += lookup_squared_norm(ids[row], delta[row])
            if name == self.parts.tied:
                # One parameter with two uses: the norm of a sum has a cross term.
                at_ids, inputs = self._crossed[row]
                self.squared[row] += 2 * (at_ids * (inputs @ delta[row].T)).sum(dtype=torch.float64)
            for sums in self.sums:
                sums.lookup(name, module.num_embeddings, ids[row], delta[row], row)
        self.visits[name] += 1

    def refusal(self, module: nn.Module, x: Tensor) -> RunFailed:
        return RunFailed(
            f"A {type(module).__name__} was given an input of shape {tuple(x.shape)}, expected the {self.n} examples "
            "of the batch first, then their tokens. Choose a `trainable` without such layers."
        )


def _forward_of(layer: Layer, collector: GradientCollector) -> Callable[..., Tensor]:
    module = layer.module
    if isinstance(module, nn.Embedding):
        return lambda ids: _embedding_forward(layer, collector, ids)
    if type(module).forward is nn.Linear.forward:

        def record(delta: Tensor, x: Tensor) -> None:
            collector.linear(layer, delta, x)

        linear: Callable[..., Tensor] = _Linear.apply
        return lambda x: linear(x, module.weight, module.bias, record)
    return lambda x: _norm_forward(layer, collector, x)


def _embedding_forward(layer: Layer, collector: GradientCollector, ids: Tensor) -> Tensor:
    module: Any = layer.module
    if ids.shape != collector.ids.shape:  # learned positions, say, which are looked up once for the whole batch
        raise collector.refusal(module, ids)
    scale = getattr(module, "embed_scale", None)
    with torch.no_grad():
        looked_up = type(module).forward(module, ids)

    def record(delta: Tensor) -> None:
        collector.embedding(layer, ids, delta if scale is None else delta * scale.to(delta.dtype))

    return _observe(module.weight, looked_up, record)


def _norm_forward(layer: Layer, collector: GradientCollector, x: Tensor) -> Tensor:
    """The norm with every vector of its own repeated for each example, so that autograd sums over the tokens only."""
    module: Any = layer.module
    if len(x) != collector.n:
        raise collector.refusal(module, x)
    own: dict[str, Tensor] = {}
    for attribute, parameter in module.named_parameters(recurse=False):
        repeated = parameter.detach().expand(len(x), *[1] * (x.dim() - 2), -1)
        if attribute in layer.names:
            repeated = _observe(parameter, repeated, _vector_record(layer.names[attribute], collector))
        own[attribute] = repeated
    if type(module).forward is nn.LayerNorm.forward:
        normed: Tensor = F.layer_norm(x, module.normalized_shape, None, None, module.eps) * own["weight"]
        return normed + own["bias"] if "bias" in own else normed
    if type(module).forward is nn.RMSNorm.forward:
        return F.rms_norm(x, module.normalized_shape, None, module.eps) * own["weight"]
    parameters = dict(module._parameters)
    try:
        module._parameters.update(own)
        found: Tensor = type(module).forward(module, x)
        return found
    finally:
        module._parameters.update(parameters)


def _vector_record(name: str, collector: GradientCollector) -> Callable[[Tensor], None]:
    return lambda gradient: collector.vector(name, gradient.reshape(collector.n, -1))
