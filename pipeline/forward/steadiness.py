"""Does a model in training mode compute what it computes in evaluation mode, as the reference was scored?"""

import sys

import torch
from torch import Tensor, nn

from pipeline.errors import RequestError
from pipeline.model.parts import causal_model, disable_dropout, saved_config
from pipeline.model.stand_in import made_up, stand_in

_TRIES = 3  # a rate of 0.1 drops something of a hundred values almost surely, a layer by chance


def require_steady(model: nn.Module) -> None:
    """RequestError naming what is random, unless a stand-in of the model without dropout gives equal values twice.

    A stand-in: under ZeRO-3 no rank has the whole model, and this is before any engine.
    """
    inner = causal_model(model)
    try:
        with saved_config(inner):
            made = stand_in(inner)
        random = _random_part(disable_dropout(made))
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        print(f"No stand-in of {type(inner).__name__} to try for dropout: {error}", file=sys.stderr, flush=True)
        return
    if random is not None:
        raise RequestError(
            f"{type(inner).__name__} computes something else in training mode than the reference was scored with: the "
            f"output of {random} changes from one forward to the next, although every dropout number of modules and "
            "config was set to 0. Policies would start off the reference; train a model whose code has no dropout or "
            "noise of its own."
        )


def _random_part(model: nn.Module) -> str | None:
    """Name and class of the innermost part whose output is another one in training mode; None if there is none."""
    prompt, response = made_up()[0][-1]
    ids = torch.tensor([prompt + response])
    steady = _outputs(model.eval(), ids)
    with torch.random.fork_rng():
        for seed in range(_TRIES):
            torch.manual_seed(seed)
            found = _outputs(model.train(), ids)
            for name in steady:
                if name in found and not torch.equal(steady[name], found[name]):
                    return f"{name or 'the model'} ({type(model.get_submodule(name)).__name__})"
    return None


@torch.no_grad()
def _outputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The first tensor that each module gives, by its name, in the order in which they finish: parts before wholes."""
    found: dict[str, Tensor] = {}

    def note(name: str, output: object) -> None:
        while isinstance(output, tuple | list) and output:
            output = output[0]
        output = getattr(output, "logits", output)
        if isinstance(output, Tensor):
            found.setdefault(name, output)

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in model.named_modules()
    ]
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
