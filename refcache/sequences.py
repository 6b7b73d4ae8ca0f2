"""The sequences of a trainer's padded batch, as prompt and response."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor


class Row(NamedTuple):
    """A sequence of a batch. places: which of its positions tell of response tokens, (length - 1,)."""

    prompt_ids: npt.NDArray[np.int64]
    response_ids: npt.NDArray[np.int64]
    places: Tensor


def rows_of(input_ids: Tensor, attention_mask: Tensor, answers: Tensor) -> Iterator[Row | None]:
    """The sequences of a batch, all (rows, length); None where all of the response was cut off.

    Raises ValueError for a sequence that is no prompt followed by a response.
    """
    for ids, present, response in zip(input_ids.cpu(), attention_mask.cpu().bool(), answers.cpu().bool(), strict=True):
        if not response.any():
            yield None
            continue
        first = int(response[present].int().argmax())
        if not response[present][first:].all():
            raise ValueError(
                "The response tokens of a sequence are not its end, so that no single row of a reference cache holds "
                "them: the data collator makes of prompt and response something else than TRL's does."
            )
        tokens = ids[present].numpy()
        yield Row(tokens[:first], tokens[first:], response[1:])
