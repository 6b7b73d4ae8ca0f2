"""Attention over one run of tokens that holds many prompts, each with its responses, without a pad and exactly.

A group is [prompt | response 1 | response 2 | ...]. A response attends to its prompt and to itself, so every token gets
the hidden state that it has in a sequence of its own. No mask over the whole run exists: its size is quadratic, and
kernels with a mask compute what it hides.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

# Groups up to this many tokens are computed side by side: below it, a call costs more than what padding computes.
SMALL = 192
# What a model may hand to its attention without changing what it computes, or that `attend` handles.
_KNOWN = {"position_ids", "use_cache", "past_key_values", "is_causal", "output_attentions", "output_hidden_states"}


class UnsupportedAttention(Exception):
    """The model's attention does something that prompt groups don't; says what."""


class PromptGroups:
    """How a run of tokens divides into groups, and the masks of one micro-batch, made once for all layers.

    lengths: of each group, tokens of the prompt and of every response; groups of up to SMALL tokens come first.
    """

    def __init__(self, lengths: Sequence[tuple[int, ...]], device: torch.device | str = "cpu") -> None:
        self.lengths = [tuple(group) for group in lengths]
        small = [sum(group) <= SMALL for group in self.lengths]
        assert small == sorted(small, reverse=True)
        self.small, self.large = self.lengths[: sum(small)], self.lengths[sum(small) :]
        self.n_small = sum(map(sum, self.small))
        self.device = torch.device(device)
        self.served: set[int] = set()  # ids of the attention modules that were here
        self._masks: dict[Hashable, Any] = {}

    def to(self, device: torch.device | str) -> "PromptGroups":
        return PromptGroups(self.lengths, device)

    def window(self, sliding_window: int | None) -> int | None:
        """None where every sequence fits into the window."""
        longest = max(group[0] + max(group[1:]) for group in self.lengths)
        return sliding_window if sliding_window is not None and sliding_window < longest else None

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Small groups padded to (groups x longest,): the token at each place (0 at pads), and each token's place."""
        sizes = [sum(group) for group in self.small]
        places = torch.cat([torch.arange(size) + row * max(sizes) for row, size in enumerate(sizes)])
        tokens = torch.zeros(len(sizes) * max(sizes), dtype=torch.int64)
        tokens[places] = torch.arange(len(places))
        return tokens.to(self.device), places.to(self.device)

    def small_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(1, groups, longest, longest), zero where the row may attend to the column; pads see the prompt."""
        key = ("small", window, dtype)
        if key not in self._masks:
            longest = max(map(sum, self.small))
            part = torch.full((len(self.small), longest), -1)
            position = torch.zeros(len(self.small), longest, dtype=torch.int64)
            for row, group in enumerate(self.small):
                part[row, : sum(group)] = torch.from_numpy(np.repeat(np.arange(len(group)), group))
                position[row, : sum(group)] = positions(group)
            sees = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
            sees &= torch.ones(longest, longest, dtype=torch.bool).tril()
            if window is not None:
                sees &= (position[:, :, None] - position[:, None, :] < window) | (part[:, :, None] < 0)
            self._masks[key] = _additive(sees[None].to(self.device), dtype)
        mask: Tensor = self._masks[key]
        return mask

    def response_mask(self, prompt: int, response: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(response, prompt + response), zero or -inf: causal, the response at the end, `window` tokens back."""
        key = (prompt, response, window, dtype)
        if key not in self._masks:
            sees = torch.ones(response, prompt + response, dtype=torch.bool, device=self.device).tril(prompt)
            self._masks[key] = _additive(sees if window is None else sees.triu(prompt - window + 1), dtype)
        mask: Tensor = self._masks[key]
        return mask

    @cached_property
    def pieces(self) -> Tensor:
        """For each token, (3, L) int32: number of its prompt or response, of its group's prompt, and its position."""
        sizes = torch.tensor([size for group in self.lengths for size in group])
        prompts = torch.tensor([0, *accumulate(map(len, self.lengths))][:-1])
        own = torch.arange(len(sizes)).repeat_interleave(sizes)
        prompt = prompts.repeat_interleave(torch.tensor(list(map(sum, self.lengths))))
        position = torch.cat([positions(group) for group in self.lengths])
        return torch.stack([own, prompt, position]).to(self.device, torch.int32)

    def block_mask(self, window: int | None) -> BlockMask:
        """FlexAttention's mask of the whole run. Made of all pairs of tokens, L x L bytes that are freed again."""
        key = ("blocks", window)
        if key not in self._masks:
            own, prompt, position = self.pieces.unbind()
            # A tensor, not the number: kernels are compiled anew for other numbers.
            hidden = position - (len(position) if window is None else window)

            def sees(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
                related = (own[column] == own[row]) | (own[column] == prompt[row])
                return related & (column <= row) & (position[column] > hidden[row])

            self._masks[key] = create_block_mask(sees, None, None, len(own), len(own), self.device)
        mask: BlockMask = self._masks[key]
        return mask


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """As kernels want it: they would turn a mask of booleans into this once for each layer, and keep it."""
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, float("-inf"))


def positions(group: Sequence[int]) -> Tensor:
    """Position ids of one group, (tokens,): every response goes on where the prompt ends."""
    prompt, *responses = group
    return torch.cat([torch.arange(prompt), *(torch.arange(prompt, prompt + response) for response in responses)])


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prompt_groups: PromptGroups,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, heads, L, d), key and value (1, KV heads, L, d) -> (1, L, heads, d).

    Raises UnsupportedAttention for whatever else the model asks of its attention (sinks, soft caps, biases).
    """
    refuse_what_is_unknown(module, attention_mask, sliding_window, others)
    prompt_groups.served.add(id(module))
    heads_per_key = query.shape[1] // key.shape[1]
    # Once for all groups; the kernels' own way of sharing keys between heads takes no mask on every device.
    key, value = (part.repeat_interleave(heads_per_key, dim=1) for part in (key, value))
    window = prompt_groups.window(sliding_window)

    def kernel(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling, dropout_p=dropout, **options)

    n_small = prompt_groups.n_small
    outputs = []
    if prompt_groups.small:
        outputs.append(_small(prompt_groups, [part[:, :, :n_small] for part in (query, key, value)], window, kernel))
    if prompt_groups.large:
        outputs += _large(prompt_groups, [part[:, :, n_small:] for part in (query, key, value)], window, kernel)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _small(groups: PromptGroups, qkv: list[Tensor], window: int | None, kernel: Callable[..., Tensor]) -> Tensor:
    tokens, places = groups.places
    shape = (qkv[0].shape[1], len(groups.small), -1, qkv[0].shape[3])
    # Heads take the place of the batch, so that the mask differs by group and broadcasts over heads.
    padded = [part.index_select(2, tokens)[0].unflatten(1, (len(groups.small), -1)) for part in qkv]
    found = kernel(*padded, attn_mask=groups.small_mask(window, padded[0].dtype))
    assert found.shape[:2] == shape[:2]
    return found.flatten(1, 2).index_select(1, places)[None]


def _large(groups: PromptGroups, qkv: list[Tensor], window: int | None, kernel: Callable[..., Tensor]) -> list[Tensor]:
    """Prompt and first response are causal as they are; each further response sees the prompt's keys and its own."""
    # split, not slices: the backward of a slice is a full array of zeros, that of all pieces is one concatenation.
    sizes = [size for prompt, first, *rest in groups.large for size in (prompt + first, *rest)]
    pieces = iter(zip(*(part.split(sizes, dim=2) for part in qkv), strict=True))
    found = []
    for prompt, first, *rest in groups.large:
        query, key, value = next(pieces)
        if window is None:
            found.append(kernel(query, key, value, is_causal=True))
        else:
            mask = groups.response_mask(0, prompt + first, window, query.dtype)
            found.append(kernel(query, key, value, attn_mask=mask))
        for response in rest:
            own_query, own_key, own_value = next(pieces)
            keys, values = (
                torch.cat([whole[:, :, :prompt], own], dim=2) for whole, own in ((key, own_key), (value, own_value))
            )
            mask = groups.response_mask(prompt, response, window, query.dtype)
            found.append(kernel(own_query, keys, values, attn_mask=mask))
    return found


def refuse_what_is_unknown(
    module: nn.Module, attention_mask: Tensor | None, window: int | None, others: dict[str, Any]
) -> None:
    """UnsupportedAttention if the module asks for more than a causal mask and a window; others: further arguments."""
    asked = sorted(name for name, value in others.items() if name not in _KNOWN and value is not None)
    if asked or attention_mask is not None:
        raise UnsupportedAttention(f"its attention takes {asked or ['attention_mask']}")
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds and layer is not None else None
    if kind is None and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        kind = "sliding_attention"
    if kind not in (None, "full_attention") and window is None:
        raise UnsupportedAttention(f"layer {layer} has {kind}, whose window its attention isn't told")
