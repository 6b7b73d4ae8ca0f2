"""Which side of the split a prompt is on, and which prompts a share selects: by hash, so that new rows move nothing."""

from hashlib import blake2b

import numpy as np


def share_of(text: str, *, seed: int, purpose: str) -> float:
    """A number in [0, 1) made of the arguments alone: uniform over texts, independent between purposes."""
    digest = blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little"), person=purpose.encode()).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def side_of(prompt_text: str, *, seed: int, test_share: float) -> str:
    """ "train" or "test". A larger `test_share` only moves prompts from train to test.

    prompt_text: the readable prompt. Not its token ids: a prompt stays on its side when the tokenizer changes, and the
    sft rows that a tokenizer is trained on can be picked from the train side before there is a tokenizer.
    """
    return "test" if share_of(prompt_text, seed=seed, purpose="split") < test_share else "train"


def is_selected(prompt_text: str, *, share: float) -> bool:
    """Whether the prompt belongs to the `share` of prompts whose chosen responses become sft rows."""
    return share_of(prompt_text, seed=0, purpose="sft rows") < share


def held_out_rows(pairs: int, most: int) -> np.ndarray:
    """Which of the test split's pairs are measured while training: `most` of them, ascending.

    The same for every variant and seed, so that their curves compare.
    """
    return np.sort(np.random.default_rng(0).permutation(pairs)[:most])
