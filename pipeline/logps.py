"""Token log-probs of responses under a causal language model, without all logits in memory at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Tokens = Sequence[int] | np.ndarray


class TokenBatch(NamedTuple):
    """N right-padded sequences and the T positions whose next token is a response token.

    input_ids: (N, L). rows, positions: (T,), position p of row n predicts token p + 1. targets: (T,), that token.
    """

    input_ids: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> "TokenBatch":
        return TokenBatch(*(tensor.to(device) for tensor in self))


def collate(sequences: Sequence[tuple[Tokens, Tokens]]) -> TokenBatch:
    """Pad (prompt ids, response ids) on the right; pad positions hold token 0 and are never read."""
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    input_ids = torch.zeros(len(sequences), max(lengths), dtype=torch.int64)
    rows, positions = [], []
    for row, ((prompt, response), length) in enumerate(zip(sequences, lengths, strict=True)):
        input_ids[row, : len(prompt)] = torch.from_numpy(np.array(prompt, dtype=np.int64))
        input_ids[row, len(prompt) : length] = torch.from_numpy(np.array(response, dtype=np.int64))
        # The first response token is predicted from the last prompt token.
        positions.append(torch.arange(len(prompt) - 1, length - 1))
        rows.append(torch.full((len(response),), row))
    flat_rows, flat_positions = torch.cat(rows), torch.cat(positions)
    return TokenBatch(input_ids, flat_rows, flat_positions, input_ids[flat_rows, flat_positions + 1])


def causal_model(model: nn.Module) -> nn.Module:
    """The transformers model itself, out of its peft wrapper if it has one (peft injects its layers in place)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class ResponseLogps(nn.Module):
    """A causal language model that answers with log-probs: forward(batch) -> (T,) float32, nats.

    model: a transformers causal LM. chunk_tokens: response tokens whose vocabulary-wide logits exist at once; they are
    recomputed in backward, so peak memory is chunk x vocabulary, not response tokens x vocabulary.
    """

    def __init__(self, model: nn.Module, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.head = ChunkedHead(model, chunk_tokens)

    def forward(self, input_ids: Tensor, rows: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        # No attention mask: padding is on the right and attention is causal, so no real token ever sees a pad.
        decoder = causal_model(self.model).base_model
        hidden = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head(hidden[rows, positions], targets)


class ChunkedHead(nn.Module):
    """Shares the model's output weights. A module of its own, so that ZeRO-3 gathers them once around all chunks."""

    def __init__(self, model: nn.Module, chunk_tokens: int) -> None:
        super().__init__()
        output = causal_model(model).get_output_embeddings()
        if not isinstance(output, nn.Linear):
            raise ValueError(
                f"{type(model).__name__}: the output head is a {type(output).__name__}, expected nn.Linear"
            )
        self.weight, self.bias = output.weight, output.bias
        self.chunk_tokens = chunk_tokens
        config = model.config.get_text_config()
        # The three ways in which transformers' architectures alter logits after the head.
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2, 3
        self.scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        self.scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        chunks = zip(hidden.split(self.chunk_tokens), targets.split(self.chunk_tokens), strict=True)
        if not torch.is_grad_enabled():
            logits = hidden.new_empty(min(len(hidden), self.chunk_tokens), len(self.weight))
            return torch.cat([self._chunk_in_place(logits, *chunk) for chunk in chunks])
        return torch.cat([checkpoint(self._chunk, *chunk, use_reentrant=False) for chunk in chunks])

    def _chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight, self.bias).float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return -F.cross_entropy(logits, targets, reduction="none")

    def _chunk_in_place(self, logits: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
        """As `_chunk`, in one array for all chunks: allocators that keep what is freed would pile up several."""
        logits = logits[: len(hidden)]
        torch.mm(hidden, self.weight.T, out=logits)
        if self.bias is not None:
            logits += self.bias
        logits = logits.float()  # the array itself in float32
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        chosen = logits.gather(1, targets[:, None])[:, 0]
        largest = logits.amax(dim=1, keepdim=True)
        log_total = logits.sub_(largest).exp_().sum(dim=1).log_() + largest[:, 0]
        return chosen - log_total


def sequence_sums(token_logps: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Sum token log-probs (T,) into their sequences (n_rows,), float32; accumulated in float64."""
    sums = torch.zeros(n_rows, dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, rows, token_logps.double()).float()
