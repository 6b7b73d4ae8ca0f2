"""Log-probs of given tokens from hidden states, without all logits in memory at once, forwards and backwards."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.forward.float32_products import add_mm, mm
from pipeline.model.parts import causal_model, text_config

# Bytes of float32 logits that exist at once where nobody says how many tokens that is.
LOGIT_BYTES = 64 << 20


class ChunkedHead(nn.Module):
    """Shares the model's output weights. A module of its own, so that ZeRO-3 gathers them once around all chunks."""

    def __init__(self, model: nn.Module, chunk_tokens: int | None) -> None:
        """model: a transformers causal LM. chunk_tokens: whose logits exist at once; None: what LOGIT_BYTES hold."""
        super().__init__()
        output = causal_model(model).get_output_embeddings()
        if not isinstance(output, nn.Linear):
            raise ValueError(
                f"{type(model).__name__}: the output head is a {type(output).__name__}, expected nn.Linear"
            )
        self.weight, self.bias = output.weight, output.bias
        self.in_place = False  # see ResponseLogps.accumulate_in_place
        self._gradient: Tensor | None = None
        config = text_config(model)
        self.chunk_tokens = chunk_tokens or max(1, LOGIT_BYTES // (4 * config.vocab_size))
        # The three ways in which transformers' architectures alter logits after the head.
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2, 3
        self.scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        self.scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probs of targets (T,) after hidden (T, width): (T,) float32 (float64 in float64), nats."""
        kind = _FrozenTokenLogps if self._frozen() and hidden.requires_grad else _TokenLogps
        apply: Callable[..., Tensor] = kind.apply
        return apply(hidden, self.weight, self.bias, targets, self)

    def _frozen(self) -> bool:
        trained = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        # A soft cap's slope needs the logits that the softmax overwrites.
        return torch.is_grad_enabled() and not trained and self.softcap is None

    def gradient(self) -> Tensor:
        """The weights' own, zero where there is none yet.

        The array is kept when the gradient is dropped: others would nest in the hole, and the next one extend the heap.
        """
        if self.weight.grad is None:
            self._gradient = torch.zeros_like(self.weight) if self._gradient is None else self._gradient.zero_()
            self.weight.grad = self._gradient
        return self.weight.grad

    def buffer(self, hidden: Tensor) -> "LogitBuffer":
        return LogitBuffer(min(len(hidden), self.chunk_tokens), self.weight)

    def logits(self, buffer: "LogitBuffer", hidden: Tensor) -> Tensor:
        """(chunk, vocabulary) in the buffer's wide array, soft cap and scale applied."""
        narrow, wide = buffer.narrow[: len(hidden)], buffer.wide[: len(hidden)]
        mm(hidden, self.weight.T, out=narrow)
        if self.bias is not None:
            narrow += self.bias
        if wide.dtype != narrow.dtype:
            wide.copy_(narrow)
        if self.scale != 1.0:
            wide *= self.scale
        if self.softcap is not None:
            wide.div_(self.softcap).tanh_().mul_(self.softcap)
        return wide


class LogitBuffer:
    """One array for all chunks: an allocator that keeps what is freed would pile up several."""

    def __init__(self, tokens: int, weight: Tensor) -> None:
        """narrow: in the weights' dtype; wide: at least float32, the same array where the weights are that wide."""
        self.narrow = weight.new_empty(tokens, len(weight))
        self.wide = (
            self.narrow if weight.dtype.itemsize >= 4 else self.narrow.new_empty(self.narrow.shape, dtype=torch.float32)
        )

    def to_narrow(self, values: Tensor) -> Tensor:
        """What stands in the wide array, in the weights' dtype."""
        return values if self.wide is self.narrow else self.narrow[: len(values)].copy_(values)


class _TokenLogps(torch.autograd.Function):
    """log softmax(head(hidden))[target]; the backward computes each chunk's logits again, in one array for all."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: ChunkedHead
    ) -> Tensor:
        ctx.head = head  # under ZeRO-3 the weights of now are gone by then, and the module's are gathered again
        buffer = head.buffer(hidden)
        logps, totals = [], []
        for states, ids in zip(hidden.split(head.chunk_tokens), targets.split(head.chunk_tokens), strict=True):
            logits = head.logits(buffer, states)
            chosen = logits.gather(1, ids[:, None])[:, 0]
            largest = logits.amax(dim=1)
            totals.append(logits.sub_(largest[:, None]).exp_().sum(dim=1).log_() + largest)
            logps.append(chosen - totals[-1])
        ctx.save_for_backward(hidden, targets, torch.cat(totals))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, targets, totals = ctx.saved_tensors
        head: ChunkedHead = ctx.head
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        in_place = head.in_place and for_weight
        d_weight = head.gradient() if in_place else torch.zeros_like(head.weight) if for_weight else None
        d_bias = torch.zeros_like(head.bias) if for_bias else None
        buffer = head.buffer(hidden)
        for start in range(0, len(hidden), head.chunk_tokens):
            chunk = slice(start, start + head.chunk_tokens)
            d_logits = _logit_gradient(head, buffer, hidden[chunk], targets[chunk], totals[chunk], grad[chunk])
            if d_hidden is not None:
                mm(d_logits, head.weight, out=d_hidden[chunk])
            if d_weight is not None:
                add_mm(d_weight, d_logits.T, hidden[chunk])
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
        return d_hidden, None if in_place else d_weight, d_bias, None, None


class _FrozenTokenLogps(torch.autograd.Function):
    """The same for a head that doesn't train: each token's gradient but for a factor, made in forward.

    A token's log-prob depends on its own hidden state alone, so backward multiplies; no logits are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: ChunkedHead
    ) -> Tensor:
        buffer, logps, slopes = head.buffer(hidden), [], torch.empty_like(hidden)
        for start in range(0, len(hidden), head.chunk_tokens):
            chunk = slice(start, start + head.chunk_tokens)
            logits, ids = head.logits(buffer, hidden[chunk]), targets[chunk, None]
            logits -= logits.amax(dim=1, keepdim=True)
            chosen = logits.gather(1, ids)[:, 0]
            total = logits.exp_().sum(dim=1)
            logps.append(chosen - total.log())
            logits *= -head.scale / total[:, None]
            logits[torch.arange(len(ids), device=ids.device), ids[:, 0]] += head.scale
            mm(buffer.to_narrow(logits), weight, out=slopes[chunk])
        ctx.save_for_backward(slopes)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grad[:, None]).to(slopes.dtype), None, None, None, None


def _logit_gradient(
    head: ChunkedHead, buffer: LogitBuffer, hidden: Tensor, targets: Tensor, totals: Tensor, grad: Tensor
) -> Tensor:
    """Gradient with respect to what the head's matrix gives, (chunk, vocabulary) in its dtype, in the buffer.

    totals: log of the sum of exp(logits), (chunk,). With z = cap * tanh(scale * x / cap), dz/dx is
    scale * (1 - (z / cap) ** 2).
    """
    logits = head.logits(buffer, hidden)
    # Another array as large, for the architectures with a soft cap alone.
    slope = None if head.softcap is None else (logits / head.softcap).square_().neg_().add_(1.0)
    logits.sub_(totals[:, None]).exp_().mul_(-grad[:, None])
    logits[torch.arange(len(hidden), device=hidden.device), targets] += grad
    if slope is not None:
        logits *= slope
    if head.scale != 1.0:
        logits *= head.scale
    return buffer.to_narrow(logits)
