"""Prompts of several turns that are too long: what is left of them."""

from collections.abc import Callable

from pipeline.encoding.dialogues import Message

_INSTRUCTIONS = ("system", "developer")


def shortened(prompt: tuple[Message, ...], fits: Callable[[tuple[Message, ...]], bool]) -> tuple[Message, ...] | None:
    """The longest end of `prompt` that fits; None where not even the last user turn fits without its content.

    System and developer turns at the beginning stay. Turns go from the oldest on, from one user turn to the next, so
    that what is kept begins with a user's; of the first that is kept, the content loses characters at its beginning.
    fits: whether a prompt is short enough once rendered.
    """
    count = next((i for i, message in enumerate(prompt) if message.role not in _INSTRUCTIONS), len(prompt))
    system, turns = prompt[:count], prompt[count:]
    for first in [0, *(i for i, turn in enumerate(turns) if i and turn.role == "user")]:
        kept = turns[first:]
        empty = (*system, kept[0]._replace(content=""), *kept[1:]) if kept else ()
        if empty and fits((empty[0]._replace(context=prompt[0].context), *empty[1:])):
            found = _cut_least(system, kept, fits)
            return (found[0]._replace(context=prompt[0].context), *found[1:])
    return None


def _cut_least(
    system: tuple[Message, ...], turns: tuple[Message, ...], fits: Callable[[tuple[Message, ...]], bool]
) -> tuple[Message, ...]:
    """With as little cut from the first turn's content as fits; without all of it it does."""
    content = turns[0].content

    def without(characters: int) -> tuple[Message, ...]:
        return (*system, turns[0]._replace(content=content[characters:]), *turns[1:])

    low, high = 0, len(content)  # without `high` it fits
    while low < high:
        middle = (low + high) // 2
        if fits(without(middle)):
            high = middle
        else:
            low = middle + 1
    return without(high)
