"""Multiple-choice questions -> the right option over wrong ones."""

import random
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from pipeline.params import ColumnNames
from pipeline.published.rows import BadForm, PairRow, asked

OPTIONS = ("options", "choices")
ANSWERS = ("answer_index", "answer", "answerKey")


def by_choice(values: Mapping[str, Any], columns: ColumnNames, wrong: str) -> tuple[list[PairRow], set[str]]:
    """One pair for one wrong option, picked by the question's own hash, or one for each; and the columns used.

    The prompt is the question with its options lettered A, B, ...; responses are a letter with its option, as
    TIGER-Lab/MMLU-Pro's own prompts write both. Options that say N/A, with which that set fills its lists, stay away.
    Raises BadForm.
    """
    name = next(name for name in OPTIONS if values.get(name) is not None)
    labels, texts = _options(values[name], name)
    answers = [column for column in ANSWERS if values.get(column) is not None]
    right = _right(values[answers[0]], answers[0], labels, len(texts))
    kept = [i for i, text in enumerate(texts) if i == right or text.strip() != "N/A"]
    lines = {i: f"{ascii_uppercase[place]}. {texts[i]}" for place, i in enumerate(kept)}
    others = [i for i in kept if texts[i] != texts[right]]
    if not others:
        raise BadForm(f"{name} holds no wrong option")
    found = asked(values, columns, None)
    if not isinstance(found.prompt, str):
        raise BadForm(f"the question is {type(found.prompt).__name__}, expected text")
    if wrong == "one":
        others = [random.Random(found.prompt).choice(others)]
    shown = found._replace(prompt="\n".join([found.prompt, *lines.values()]))
    return [PairRow(shown, lines[right], lines[other]) for other in others], {name, *answers}


def _options(value: Any, name: str) -> tuple[list[str], list[str]]:
    """(labels, texts); the {text, label} form is that of allenai/ai2_arc."""
    labels = value.get("label") if isinstance(value, dict) else None
    texts = value.get("text") if isinstance(value, dict) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or len(texts) > 26:
        raise BadForm(f"{name} is no list of at most 26 texts")
    return labels or list(ascii_uppercase[: len(texts)]), texts


def _right(value: Any, column: str, labels: list[str], count: int) -> int:
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count:
        return value
    raise BadForm(f"{column} is {value!r}, expected a number from 0 to {count - 1} or one of {', '.join(labels)}")
