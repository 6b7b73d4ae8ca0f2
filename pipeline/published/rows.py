"""What a published row says, in parts that are still in whatever form they came: asked, chosen, rejected."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pipeline.params import ColumnNames

CONTEXT = ("tools", "chat_template_kwargs")  # columns that reach the chat template as they are
_ASSISTANT = ("assistant", "Assistant", "gpt")


class BadForm(ValueError):
    """Why a row can't be read in its form."""


class Asked(NamedTuple):
    prompt: Any  # text, messages, or None where the responses hold it
    system: str  # "" where there is none
    context: Mapping[str, Any]  # tools and the like
    category: str | None
    used: frozenset[str]  # columns that this was taken from


class PairRow(NamedTuple):
    """One chosen with one rejected response, or several of either."""

    asked: Asked
    chosen: Any  # text, a message, a list of messages, or a list of responses
    rejected: Any
    chosen_reward: Any = None
    rejected_reward: Any = None


class FeedbackRow(NamedTuple):
    """One response, and whether it is desirable."""

    asked: Asked
    completion: Any  # text, a message, or a list of messages
    desirable: bool


def first_of(values: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of `names` that the row has and that isn't null."""
    return next((name for name in names if values.get(name) is not None), None)


def is_dialogue(value: Any) -> bool:
    """Whether `value` is a list of messages, in the role/content or the from/value form."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def role_of(message: Mapping[str, Any]) -> Any:
    return message.get("role", message.get("from"))


def ends_with_answer(dialogue: list[dict[str, Any]]) -> bool:
    return role_of(dialogue[-1]) in _ASSISTANT


def asked(values: Mapping[str, Any], columns: ColumnNames, chosen: Any, *, prompt: str | None = None) -> Asked:
    """What `values` asks.

    prompt: the column that holds it, where the form says so. chosen: the chosen response, which may hold the dialogue
    itself. Raises BadForm.
    """
    used = {name for name in CONTEXT if values.get(name)}
    name = prompt or first_of(values, columns.candidates("prompt"))
    question = values.get(name) if name is not None else None
    if name is not None and question is not None:
        used.add(name)
        if name == "instruction" or "input" in columns.model_fields_set:
            question = _with_input(question, values, columns, used)
    elif (name := first_of(values, columns.candidates("input"))) is not None and isinstance(values[name], str):
        question = values[name]
        used.add(name)
    elif (name := first_of(values, columns.candidates("messages"))) is not None and not _is_whole(chosen):
        question = _dialogue_before(values[name], name, chosen)
        used.add(name)
    question = _with_history(question, values, columns, used)
    system = _system(values, columns, used)
    category = values.get(columns.category)
    used.add(columns.category)
    return Asked(question, system, {n: values[n] for n in CONTEXT if values.get(n)}, _text(category), frozenset(used))


def _with_input(question: Any, values: Mapping[str, Any], columns: ColumnNames, used: set[str]) -> Any:
    name = first_of(values, columns.candidates("input"))
    if name is None or name in used:
        return question
    used.add(name)
    more = values[name]
    if not isinstance(question, str) or not isinstance(more, str):
        raise BadForm(f"{name} is {type(more).__name__} beside a prompt of {type(question).__name__}, expected texts")
    return "\n".join(text for text in (question, more) if text)


def _dialogue_before(value: Any, name: str, chosen: Any) -> list[dict[str, Any]]:
    """The prompt that `value` is, without the chosen response where that stands at its end too."""
    if not is_dialogue(value):
        raise BadForm(f"{name} is {type(value).__name__}, expected a list of messages")
    if not ends_with_answer(value):
        return list(value)
    answer = chosen[-1] if is_dialogue(chosen) else chosen
    said = [
        message.get("content", message.get("value")) for message in (value[-1], answer) if isinstance(message, dict)
    ]
    if said[-1] != said[0] or (isinstance(answer, str) and answer != said[0]):
        raise BadForm(f"{name} ends with an assistant's turn that is not the chosen response")
    return list(value[:-1])


def _with_history(question: Any, values: Mapping[str, Any], columns: ColumnNames, used: set[str]) -> Any:
    name = first_of(values, columns.candidates("history"))
    if name is None or name in used:
        return question
    history = values[name]
    named = "history" in columns.model_fields_set
    if not isinstance(history, list):
        if named:
            raise BadForm(f"{name} is {type(history).__name__}, expected [question, answer] pairs or messages")
        return question  # some other history than that of a dialogue
    used.add(name)
    if not history or question is None:
        return question
    turns = history if is_dialogue(history) else [turn for pair in history for turn in _turns(pair, name)]
    return turns + (question if isinstance(question, list) else [{"role": "user", "content": question}])


def _turns(pair: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise BadForm(f"{name} must hold pairs of texts [question, answer], or messages")
    return [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]


def _system(values: Mapping[str, Any], columns: ColumnNames, used: set[str]) -> str:
    name = first_of(values, columns.candidates("system"))
    if name is None:
        return ""
    used.add(name)
    if not isinstance(values[name], str):
        raise BadForm(f"{name} is {type(values[name]).__name__}, expected text; prepare.columns.system: null leaves it")
    return str(values[name])


def _is_whole(response: Any) -> bool:
    """Whether a response is a dialogue from its beginning on."""
    if isinstance(response, list) and response and isinstance(response[0], list):
        response = response[0]
    return is_dialogue(response) and role_of(response[0]) not in _ASSISTANT


def _text(category: Any) -> str | None:
    if isinstance(category, list) and all(isinstance(item, str) for item in category):
        return ", ".join(category) or None
    if isinstance(category, list | dict):
        raise BadForm(f"category is {type(category).__name__}, expected text or a list of texts")
    return None if category is None else str(category)
