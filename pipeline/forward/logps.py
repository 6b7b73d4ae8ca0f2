"""Token log-probs of responses under a causal language model, in padded rows or in one run without pads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.forward.float32_products import use_float32_products
from pipeline.forward.head import ChunkedHead
from pipeline.forward.prompt_groups import PromptGroups, positions
from pipeline.model.parts import causal_model

Tokens = Sequence[int] | np.ndarray


class TokenBatch(NamedTuple):
    """N sequences of prompt and response, and the T places whose next token is a response token.

    input_ids: (N, L), a right-padded sequence a row, or (1, L), groups one after another. rows: (T,), the sequence that
    the token belongs to. places: (T,), in the flattened input_ids, of the token that predicts it. targets: (T,), the
    token. position_ids: (1, L), and groups: how the run divides; both None where padded.
    """

    input_ids: Tensor
    rows: Tensor
    places: Tensor
    targets: Tensor
    position_ids: Tensor | None = None
    groups: PromptGroups | None = None

    def to(self, device: torch.device | str) -> "TokenBatch":
        moved: list[Any] = [part if part is None else part.to(device) for part in self]
        return TokenBatch(*moved)


def collate(sequences: Sequence[tuple[Tokens, Tokens]]) -> TokenBatch:
    """Pad (prompt ids, response ids) on the right; pad positions hold token 0 and are never read."""
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    longest = max(lengths)
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    rows, places = [], []
    for row, ((prompt, response), length) in enumerate(zip(sequences, lengths, strict=True)):
        input_ids[row, : len(prompt)] = torch.from_numpy(np.array(prompt, dtype=np.int64))
        input_ids[row, len(prompt) : length] = torch.from_numpy(np.array(response, dtype=np.int64))
        # The first response token is predicted from the last prompt token.
        places.append(torch.arange(len(prompt) - 1, length - 1) + row * longest)
        rows.append(torch.full((len(response),), row))
    flat = torch.cat(places)
    return TokenBatch(input_ids, torch.cat(rows), flat, input_ids.flatten()[flat + 1])


def pack(sequences: Sequence[tuple[Tokens, Tokens]], prompts: Sequence[int] | np.ndarray) -> TokenBatch:
    """(prompt ids, response ids) in one run without pads; sequences of equal number in `prompts` share their prompt.

    For models that `use_prompt_groups` prepared. prompts: (N,).
    """
    members: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        members.setdefault(int(prompt), []).append(row)
    shape = {
        prompt: (len(sequences[rows[0]][0]), *(len(sequences[row][1]) for row in rows))
        for prompt, rows in members.items()
    }
    order = sorted(members, key=lambda prompt: sum(shape[prompt]))
    ids, rows, places = [], [], []
    start = 0
    for number in order:
        prompt = sequences[members[number][0]][0]
        ids.append(np.array(prompt, dtype=np.int64))
        start += len(prompt)
        last_of_prompt = start - 1
        for row in members[number]:
            response = sequences[row][1]
            ids.append(np.array(response, dtype=np.int64))
            # The first response token is predicted from the last prompt token, wherever the response stands.
            places += [np.array([last_of_prompt]), np.arange(start, start + len(response) - 1)]
            rows.append(np.full(len(response), row))
            start += len(response)
    targets = np.concatenate([np.array(sequences[row][1], dtype=np.int64) for n in order for row in members[n]])
    groups = PromptGroups([shape[number] for number in order])
    return TokenBatch(
        torch.from_numpy(np.concatenate(ids))[None],
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate(places)),
        torch.from_numpy(targets),
        torch.cat([positions(group) for group in groups.lengths])[None],
        groups,
    )


class ResponseLogps(nn.Module):
    """A causal language model that answers with log-probs: forward(*TokenBatch) -> (T,) float32, nats.

    model: a transformers causal LM. chunk_tokens: response tokens whose vocabulary-wide logits exist at once, None for
    a fixed number of bytes; they are computed again in backward, so peak memory does not grow with response tokens x
    vocabulary.
    """

    def __init__(self, model: nn.Module, chunk_tokens: int | None) -> None:
        super().__init__()
        self.model = model
        use_float32_products(model)
        self.head = ChunkedHead(model, chunk_tokens)

    def accumulate_in_place(self) -> None:
        """Let backward add to the gradient of the output weights itself, not make arrays as large and add those up.

        For plain autograd only: a hook that waits for this gradient would not be called.
        """
        self.head.in_place = True
        embedding = causal_model(self.model).get_input_embeddings()
        tied = isinstance(embedding, nn.Embedding) and embedding.weight is self.head.weight
        # The rows of the tokens at hand, onto the head's gradient, which is there before. On GPUs in no fixed order.
        if tied and embedding.weight.device.type == "cpu":
            embedding.sparse = True

    def forward(
        self,
        input_ids: Tensor,
        rows: Tensor,
        places: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
        groups: PromptGroups | None = None,
    ) -> Tensor:
        found: Tensor = self.head(self.states(input_ids, places, position_ids, groups), targets)
        return found

    def states(
        self, input_ids: Tensor, places: Tensor, position_ids: Tensor | None, groups: PromptGroups | None
    ) -> Tensor:
        """Final hidden states at `places`, (T, width)."""
        decoder = causal_model(self.model).base_model
        # No attention mask for padded rows: padding is on the right and attention is causal, so no real token ever
        # sees a pad.
        packed: dict[str, Any] = {} if groups is None else {"position_ids": position_ids, "prompt_groups": groups}
        hidden: Tensor = decoder(input_ids=input_ids, use_cache=False, **packed).last_hidden_state
        # index_select: the last prompt token serves all its responses, and repeated indices are slow otherwise.
        return hidden.flatten(0, 1).index_select(0, places)


def sequence_sums(token_logps: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Sum token log-probs (T,) into their sequences (n_rows,), float32; accumulated in float64."""
    sums = torch.zeros(n_rows, dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, rows, token_logps.double()).float()
