"""generation_config.json, which decides nothing here, yet can keep a finished model from being saved."""

import sys
from typing import TYPE_CHECKING

from pipeline.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings that only sampling reads, and only beam search. Beside greedy decoding they say nothing, and transformers
# loads them, but does not save them.
SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")


def make_savable(model: "PreTrainedModel") -> None:
    """Unset what its generation config says without effect, with a line; RequestError where it stays invalid."""
    config = model.generation_config
    if config is None or _problem(model) is None:
        return
    idle = [*(SAMPLING if config.do_sample is not True else ()), *(BEAMS if config.num_beams in (None, 1) else ())]
    unset = [name for name in idle if getattr(config, name, None) is not None]
    for name in unset:
        setattr(config, name, None)
    if (problem := _problem(model)) is not None:
        raise RequestError(
            f"The generation_config.json of {model.name_or_path or type(model).__name__} is one that transformers "
            f"refuses to save, so no model with it could be published: {problem} Correct or remove that file."
        )
    print(
        f"generation_config.json: {', '.join(unset)} unset, which greedy decoding does not read and transformers "
        "refuses to save beside it",
        file=sys.stderr,
    )


def _problem(model: "PreTrainedModel") -> str | None:
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None
