"""Dialogues, as messages or as "Human: ... Assistant: ..." text, and where the prompt ends and the answer starts."""

import json
import re
from typing import Any, NamedTuple


class Message(NamedTuple):
    """One turn.

    extra: a JSON object of what else the message holds (tool_calls, reasoning_content, name), or "". context: of a
    dialogue's first message, a JSON object of what its row gives the template beside messages (tools,
    chat_template_kwargs), or "".
    """

    role: str
    content: str
    extra: str = ""
    context: str = ""

    def for_template(self) -> dict[str, Any]:
        found = {"role": self.role, "content": self.content}
        return found | json.loads(self.extra) if self.extra else found


Prompt = str | tuple[Message, ...]  # text for tokenizers without a chat template, messages for those with one
Answer = str | Message  # a message where it holds more than its text

_TURN = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")
_ROLE_OF = {"Human": "user", "Assistant": "assistant"}
# Other names of the roles that every template knows, whose meaning is plain.
_ROLES = dict.fromkeys(("human", "Human", "User", "USER"), "user")
_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "Assistant", "ASSISTANT"), "assistant")
_ROLES |= dict.fromkeys(("System", "SYSTEM"), "system")
_ROLES |= {"observation": "tool"}  # of LLaMA-Factory's sharegpt form, whose calls are turns of function_call


class BadDialogue(ValueError):
    """Why a value is no usable dialogue; becomes the reason of a bad row."""


def is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def messages_of(value: list[dict[str, Any]], column: str) -> tuple[Message, ...]:
    """`value` as messages, also in the from/value form. Raises BadDialogue."""
    return tuple(_message(item, f"message {number} of {column}") for number, item in enumerate(value))


def _message(item: dict[str, Any], what: str) -> Message:
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    role, content = item.get(role_key), item.get(content_key)
    extra = {name: part for name, part in item.items() if name not in (role_key, content_key) and part is not None}
    if content is None and extra.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = _joined(content, what)
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadDialogue(f"{what} needs the texts role and content, found {_shape(item)}")
    if role == "function_call":
        return Message("assistant", "", json_text(extra | {"tool_calls": _calls(content, what)}))
    return Message(_ROLES.get(role, role), content, json_text(extra))


def _calls(content: str, what: str) -> list[dict[str, Any]]:
    """{"name", "arguments"}, or a list of such, in JSON."""
    try:
        calls = json.loads(content)
    except ValueError as error:
        raise BadDialogue(f"{what} is a function_call without JSON: {error}") from None
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def json_text(value: dict[str, Any]) -> str:
    """`value` as it will be read again, in its own order, which templates print; "" for an empty one."""
    return json.dumps(value, ensure_ascii=False) if value else ""


def text_of(answer: Answer) -> str:
    return answer if isinstance(answer, str) else answer.content


def _joined(parts: list[Any], what: str) -> str:
    """The text of content that comes in parts."""
    kinds = [str(part.get("type", "text")) if isinstance(part, dict) else type(part).__name__ for part in parts]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if any(kind not in ("text", "str") for kind in kinds) or not all(isinstance(text, str) for text in texts):
        raise BadDialogue(f"{what} has parts that are no text ({', '.join(sorted(set(kinds)))}); only texts are scored")
    return "".join(map(str, texts))


def _shape(item: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {type(value).__name__}" for key, value in list(item.items())[:6]) + "}"


def split_messages(messages: tuple[Message, ...], column: str) -> tuple[tuple[Message, ...], Answer]:
    """(all turns but the last, the last one); the last turn must be the assistant's."""
    if not messages or messages[-1].role != "assistant":
        found = f"a turn of {messages[-1].role!r}" if messages else "nothing"
        raise BadDialogue(f"{column} must end with the assistant's turn, it ends with {found}")
    if len(messages) == 1:
        raise BadDialogue(f"{column} holds no turn before the answer, so there is no prompt")
    last = messages[-1]
    return messages[:-1], last if last.extra else last.content


def is_plain_dialogue(text: str) -> bool:
    """Whether `text` is the hh-rlhf form: turns headed "Human:" and "Assistant:" after blank lines."""
    return _TURN.match(text) is not None and any(mark[1] == "Assistant" for mark in _TURN.finditer(text))


def plain_messages(text: str, column: str) -> tuple[Message, ...]:
    """The turns of a plain dialogue as messages, their outer white space removed."""
    marks = list(_TURN.finditer(text))
    if not marks or marks[0].start() != 0:
        raise BadDialogue(f'{column} is no dialogue: it does not start with "Human:" or "Assistant:"')
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return tuple(
        Message(_ROLE_OF[mark[1]], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)
    )


def split_plain(text: str, column: str) -> tuple[str, str]:
    """(the text up to and including the last "Assistant:", the rest), white space untouched."""
    split_messages(plain_messages(text, column), column)  # the same rows are good with and without a chat template
    *_, last = _TURN.finditer(text)
    return text[: last.end()], text[last.end() :]


def where_they_differ(chosen: Prompt, rejected: Prompt) -> str:
    """How two prompts that should be equal differ, in words."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        return "their texts before the last answer differ"
    if len(chosen) != len(rejected):
        return f"chosen has {len(chosen) + 1} turns, rejected has {len(rejected) + 1}"
    turn = next(number for number, pair in enumerate(zip(chosen, rejected, strict=True)) if pair[0] != pair[1])
    return f"turn {turn + 1} of {len(chosen) + 1} differs"


def is_empty(prompt: Prompt) -> bool:
    """True where nothing is asked: no text, or none in the last turn (an empty system turn is harmless)."""
    text = prompt if isinstance(prompt, str) else prompt[-1].content if prompt else ""
    return not text.strip()


def readable(prompt: Prompt) -> str:
    """What `prompt_text` holds: the text itself, a single user turn's text, or all turns headed by their role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].role == "user" and not prompt[0].extra:
        return prompt[0].content
    turns = (f"[{turn.role}] {turn.content}{turn.extra and f' {turn.extra}'}" for turn in prompt)
    return "\n\n".join(turns)
