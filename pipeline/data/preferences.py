"""What a row asks, chooses and rejects -> preferences and supervised examples in one canonical form.

Each part may be text, messages, a whole dialogue (as messages or as "Human:/Assistant:" text), or several responses.
"""

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.encoding.dialogues import (
    Answer,
    BadDialogue,
    Message,
    Prompt,
    is_empty,
    is_messages,
    is_plain_dialogue,
    json_text,
    messages_of,
    plain_messages,
    split_messages,
    split_plain,
    where_they_differ,
)
from pipeline.errors import RequestError
from pipeline.params import ColumnNames
from pipeline.published.files import BadRow, Row
from pipeline.published.rows import CONTEXT, Asked, BadForm, FeedbackRow, PairRow, asked, first_of


class Preference(NamedTuple):
    where: str
    prompt: Prompt
    chosen: Answer
    rejected: Answer
    category: str | None
    chosen_reward: float | None
    rejected_reward: float | None


class Feedback(NamedTuple):
    where: str
    prompt: Prompt
    response: Answer
    desirable: bool
    category: str | None


class SupervisedExample(NamedTuple):
    where: str
    prompt: Prompt
    completion: Answer


class _Bad(ValueError):
    """Why a row is refused."""


def parse_pair(row: PairRow, where: str, *, chat: bool) -> Iterator[Preference | BadRow]:
    """Every chosen response of `row` with every rejected one; a bad combination is yielded as BadRow, the others stay.

    chat: prompts become messages (for a chat template); otherwise they stay plain text, and messages raise
    RequestError, because the parameters do not fit the data.
    """
    try:
        prompt = _prompt(row.asked.prompt)
        chosen = _responses(row.chosen, "chosen")
        rejected = _responses(row.rejected, "rejected")
        chosen_rewards = _rewards(row.chosen_reward, len(chosen), "chosen_reward")
        rejected_rewards = _rewards(row.rejected_reward, len(rejected), "rejected_reward")
    except _Bad as error:
        yield BadRow(where, str(error))
        return
    for i, better in enumerate(chosen):
        for j, worse in enumerate(rejected):
            try:
                found, good, bad = _pair(prompt, better, worse, chat=chat, where=where)
                found = _whole_prompt(found, row.asked, chat=chat, where=where)
            except (_Bad, BadDialogue) as error:
                yield BadRow(where, f"{_which(i, len(chosen), j, len(rejected))}{error}")
            else:
                yield Preference(where, found, good, bad, row.asked.category, chosen_rewards[i], rejected_rewards[j])


def parse_feedback(row: FeedbackRow, where: str, *, chat: bool) -> Feedback | BadRow:
    """As `parse_pair`, of a single response."""
    try:
        responses = _responses(row.completion, "completion")
        if len(responses) > 1:
            raise _Bad(f"completion holds {len(responses)} texts, expected one")
        prompt, response = _split_whole(_prompt(row.asked.prompt), responses[0], "completion", chat=chat, where=where)
        _refuse_empty(prompt, response, "completion")
        prompt = _whole_prompt(prompt, row.asked, chat=chat, where=where)
    except (_Bad, BadDialogue) as error:
        return BadRow(where, str(error))
    return Feedback(where, prompt, response, row.desirable, row.asked.category)


def parse_supervised(row: Row, columns: ColumnNames, *, chat: bool) -> SupervisedExample | BadRow:
    """`prompt` and `completion`, or `messages` that end with the assistant's turn."""
    values = row.values
    try:
        if columns.completion in values:
            responses = _responses(values[columns.completion], columns.completion)
            if len(responses) > 1:
                raise _Bad(f"{columns.completion} holds {len(responses)} texts, expected one")
            found = asked(values, columns, responses[0])
            whole = _prompt(found.prompt), responses[0], columns.completion
        else:
            name = first_of(values, columns.candidates("messages"))
            if name is None or not is_messages(values[name]):
                raise _Bad(
                    f"no column {columns.completion!r} and no messages (found {', '.join(map(repr, values))}); "
                    "prepare.columns can name another"
                )
            found = asked(
                {n: v for n, v in values.items() if n in (*CONTEXT, *columns.candidates("system"))}, columns, None
            )
            whole = None, values[name], name
        prompt, completion = _split_whole(*whole, chat=chat, where=row.where)
        _refuse_empty(prompt, completion, whole[2])
        prompt = _whole_prompt(prompt, found, chat=chat, where=row.where)
    except (_Bad, BadForm, BadDialogue) as error:
        return BadRow(row.where, str(error))
    return SupervisedExample(row.where, prompt, completion)


def _whole_prompt(prompt: Prompt, found: Asked, *, chat: bool, where: str) -> Prompt:
    """The prompt with its row's system turn, and with what the row gives the chat template beside messages."""
    if found.system and not chat:
        raise RequestError(
            f"{where}: there is a system turn, but no chat template to render it. Set prepare.chat_template to a jinja "
            "file (or to auto, with a model whose tokenizer has one), or leave it out: prepare.columns.system: null."
        )
    if isinstance(prompt, str):
        return prompt
    if found.system:
        if prompt[0].role != "system":
            prompt = (Message("system", found.system), *prompt)
        elif prompt[0].content != found.system:
            raise _Bad("the system column and the dialogue's own system turn differ")
    context = dict(found.context)
    if isinstance(context.get("tools"), str):
        try:
            context["tools"] = json.loads(context["tools"])
        except ValueError as error:
            raise _Bad(f"tools is no JSON: {error}") from None
    return (prompt[0]._replace(context=json_text(context)), *prompt[1:]) if context else prompt


def _which(i: int, n_chosen: int, j: int, n_rejected: int) -> str:
    names = [f"chosen {i}"] * (n_chosen > 1) + [f"rejected {j}"] * (n_rejected > 1)
    return " with ".join(names) + ": " if names else ""


def _prompt(value: Any) -> Any:
    if value is None or isinstance(value, str) or is_messages(value):
        return value
    if value == []:
        raise _Bad("prompt is empty")
    raise _Bad(f"prompt is {_type_name(value)}, expected text or a list of messages")


def _responses(value: Any, column: str) -> list[Any]:
    """The responses, each a text or a list of messages; one that stands alone becomes a list of one."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str) or is_messages(value):
        return [value]
    if value is None or value == []:
        raise _Bad(f"{column} is {'null' if value is None else 'an empty list'}")
    if isinstance(value, list) and (all(isinstance(v, str) for v in value) or all(is_messages(v) for v in value)):
        return value
    raise _Bad(f"{column} is {_type_name(value)}, expected text, a list of messages, or a list of either")


def _type_name(value: Any) -> str:
    if isinstance(value, list):
        return "a list of " + " and ".join(sorted({type(item).__name__ for item in value}))
    return type(value).__name__


def _rewards(value: Any, count: int, column: str) -> list[float | None]:
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count:
        raise _Bad(f"{column} holds {len(values)} numbers for {count} responses")
    return [_reward(item, column) for item in values]


def _reward(value: Any, column: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Bad(f"{column} is {type(value).__name__} {str(value)[:40]!r}, expected a number")
    if math.isinf(value):
        raise _Bad(f"{column} is {value}, expected a finite number")
    return None if math.isnan(value) else float(value)  # tables without a null write NaN for "none"


def _pair(prompt: Any, chosen: Any, rejected: Any, *, chat: bool, where: str) -> tuple[Prompt, Answer, Answer]:
    chosen_prompt, chosen_text = _split_whole(prompt, chosen, "chosen", chat=chat, where=where)
    rejected_prompt, rejected_text = _split_whole(prompt, rejected, "rejected", chat=chat, where=where)
    if chosen_prompt != rejected_prompt:
        raise _Bad(
            f"chosen and rejected part before the last answer: {where_they_differ(chosen_prompt, rejected_prompt)}"
        )
    _refuse_empty(chosen_prompt, chosen_text, "chosen")
    _refuse_empty(chosen_prompt, rejected_text, "rejected")
    if chosen_text == rejected_text:
        raise _Bad("chosen and rejected are identical")
    return chosen_prompt, chosen_text, rejected_text


def _refuse_empty(prompt: Prompt, response: Answer, column: str) -> None:
    if is_empty(prompt):
        raise _Bad("the prompt is empty")
    if isinstance(response, str) and not response.strip():
        raise _Bad(f"{column} is empty")


def _split_whole(prompt: Any, response: Any, column: str, *, chat: bool, where: str) -> tuple[Prompt, Answer]:
    """(canonical prompt, response text) of one response, whether it stands alone or holds the whole dialogue."""
    if isinstance(prompt, list) or isinstance(response, list):
        if not chat:
            raise RequestError(
                f"{where}: {column} or its prompt is a list of messages, but there is no chat template to render it. "
                "Set prepare.chat_template to a jinja file (or to auto, with a model whose tokenizer has one), "
                "or give plain text."
            )
        return split_messages(_whole_messages(prompt, response, column), column)
    text = _plain_dialogue(prompt, response)
    if text is not None:
        return split_messages(plain_messages(text, column), column) if chat else split_plain(text, column)
    if prompt is None:
        raise _Bad(
            f'no prompt: the row has none, and {column} is no dialogue of messages or of "Human:/Assistant:" text'
        )
    return ((Message("user", prompt),) if chat else prompt), response


def _plain_dialogue(prompt: str | None, response: str) -> str | None:
    if prompt is None:
        return response if is_plain_dialogue(response) else None
    if is_plain_dialogue(prompt) and prompt.rstrip().endswith("Assistant:"):
        return response if response.startswith(prompt) else prompt + response
    return None


def _whole_messages(prompt: Any, response: Any, column: str) -> tuple[Message, ...]:
    head = messages_of(prompt, "prompt") if isinstance(prompt, list) else ()
    if isinstance(prompt, str):
        head = (Message("user", prompt),)
    if isinstance(response, str):
        if not head:
            raise _Bad(f"{column} is plain text beside messages, and the row has no prompt")
        return (*head, Message("assistant", response))
    turns = messages_of(response, column)
    if not head or turns[0].role not in ("system", "user"):
        return head + turns
    # `response` is a whole dialogue although there is a prompt: the prompt must be found in it, not stand before it.
    if isinstance(prompt, str):
        found = any(turn.role == "user" and turn.content.strip() == prompt.strip() for turn in turns[:-1])
    else:
        found = turns[: len(head)] == head
    if not found:
        raise _Bad(
            f"{column} is a whole dialogue that does not contain the prompt; where `prompt` means something else, "
            "point prepare.columns.prompt at a column that does not exist"
        )
    return turns
