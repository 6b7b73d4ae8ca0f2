"""A small model of the same architecture, to try on what can't be tried on the model itself."""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

VOCABULARY = 64
WINDOW = 6  # tokens; shorter than what is made up


def stand_in(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """The architecture with few layers, but one of each kind, few tokens, a short window and random weights; on CPU.

    The model itself is large, and under ZeRO-3 no rank has all of it. changes: of the language model's config.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.num_hidden_layers = 1 + max(kinds.index(kind) for kind in set(kinds))
        text.layer_types = kinds[: text.num_hidden_layers]
    else:
        text.num_hidden_layers = min(2, text.num_hidden_layers)
    if getattr(text, "sliding_window", None):
        text.sliding_window = min(WINDOW, text.sliding_window)
    text.vocab_size = VOCABULARY
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    for name, value in changes.items():
        setattr(text, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = type(model)(config)
    return made.float().eval()


def made_up(scale: int = 1) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
    """Three sequences for a stand-in, and the numbers of their two prompts; the longest has 16 * scale tokens."""
    draw = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(VOCABULARY, (n * scale,), generator=draw).tolist()

    first, second = tokens(7), tokens(4)
    return [(first, tokens(5)), (second, tokens(6)), (first, tokens(9))], [0, 1, 0]
