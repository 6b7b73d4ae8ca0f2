"""Dialogues -> the texts of prompt and response, by a tokenizer's chat template."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import date
from typing import Any

from pipeline.encoding.dialogues import Answer, Message
from pipeline.errors import RequestError

# Some templates (Llama 3.2) print today's date. Keys are made of token ids, so tomorrow every cached value would be
# void; this is the date that Llama's own template falls back to.
TEMPLATE_DATE = date(2024, 7, 26)

# What a generation prompt may end with that the rendering of an assistant's turn need not begin with.
_THINK = re.compile(r"<think>\s*(</think>\s*)?\Z")


class Refused(ValueError):
    """Why the chat template renders no usable text for one dialogue."""


class Renderer:
    def __init__(self, tokenizer: Any, special_tokens: Iterable[str]) -> None:
        self._tokenizer, self._special = tokenizer, list(special_tokens)
        self._ends: tuple[str, ...] | None = None
        self.unrendered: Counter[str] = Counter()  # distinct prompts or responses whose field the template drops

    def prompts(self, prompts: Sequence[Any]) -> "list[str | Refused]":
        """The text before a response to each of these messages, or why there is none."""
        found: list[str | Refused] = []
        for prompt, text in zip(prompts, self._templates(prompts, add_generation_prompt=True), strict=True):
            try:
                found.append(text if isinstance(text, Refused) else self._before_response(prompt, text))
            except Refused as error:
                found.append(error)
        return found

    def added(self, examples: Sequence[tuple[Any, str, Answer]]) -> "list[str | Refused]":
        """What each whole dialogue adds to its prompt; examples: (messages, the text of `prompts`, response)."""
        lasts = [self._last_turn(response) for _, _, response in examples]
        dialogues = [(*prompt, last) for last, (prompt, _, _) in zip(lasts, examples, strict=True)]
        wholes = self._templates(dialogues, add_generation_prompt=False)
        found: list[str | Refused] = []
        for (_, start, _), last, whole in zip(examples, lasts, wholes, strict=True):
            try:
                found.append(self._added(start, last, whole))
            except Refused as error:
                found.append(error)
        return found

    def _last_turn(self, response: Answer) -> Message:
        last = Message("assistant", response) if isinstance(response, str) else response
        return last._replace(content=self._unclosed(last.content))

    def _added(self, start: str, last: Message, whole: "str | Refused") -> str:
        """What the whole dialogue adds to its prompt. Raises Refused where it does not begin with it."""
        if isinstance(whole, Refused):
            raise whole
        if last.extra:
            self._note_unrendered(json.loads(last.extra), whole[len(start) :])
        if not whole.startswith(start):
            common = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(whole))
            raise Refused(
                "the chat template renders the dialogue so that it does not begin with its own prompt, so the response "
                f"can't be told from it: the prompt goes on with {start[common:][:60]!r}, the dialogue with "
                f"{whole[common:][:60]!r}. Set prepare.chat_template to a jinja file whose generation prompt is how an "
                "assistant's turn begins, or to never"
            )
        return whole[len(start) :]

    def _before_response(self, prompt: Any, text: str) -> str:
        """Without a block of thoughts that the rendered prompt ends with. Raises Refused."""
        self._require_all_turns(prompt, text)
        if prompt[0].context:
            context = json.loads(prompt[0].context)
            settings = context.pop("chat_template_kwargs", {})
            self._note_unrendered(context, text)
            self.unrendered.update(name for name in settings if name not in str(self._tokenizer.chat_template))
        return _THINK.sub("", text)

    def _unclosed(self, content: str) -> str:
        """Without the end-of-turn tokens that a text rendered before ends with; the template closes it again."""
        ends = self._closing()
        stripped = content.rstrip()
        while stripped.endswith(ends):
            token = max((end for end in ends if stripped.endswith(end)), key=len)
            content = stripped = stripped.removesuffix(token).rstrip()
        return content

    def _closing(self) -> tuple[str, ...]:
        """The end-of-sequence token, and the special tokens that the template puts behind an answer."""
        if self._ends is None:
            behind = ""
            with suppress(Refused):
                asked = (Message("user", "one"), Message("assistant", "two"))
                behind = self._template(asked, add_generation_prompt=False).rpartition("two")[2]
            found = {token for token in self._special if token and token in behind}
            self._ends = tuple(found | ({self._tokenizer.eos_token} - {None, ""}))
        return self._ends

    def _note_unrendered(self, fields: dict[str, Any], text: str) -> None:
        """Count the fields of which no word is in the text."""
        for name, value in fields.items():
            words = [word for word in _words(value) if word.strip()]
            if words and not any(word.strip() in text for word in words):
                self.unrendered[name] += 1

    def _require_all_turns(self, prompt: Any, text: str) -> None:
        """Refused for a turn of which the template renders nothing, as of a role that it does not know."""
        for number, message in enumerate(prompt):
            said = message.content.strip()
            if said and said not in text:
                silent = (*prompt[:number], message._replace(content=""), *prompt[number + 1 :])
                if self._template(silent, add_generation_prompt=True) == text:
                    raise Refused(
                        f"the chat template renders nothing of turn {number + 1}, whose role is {message.role!r}; it "
                        f"renders {', '.join(self._known_roles())}"
                    )

    def _known_roles(self) -> list[str]:
        """The usual roles of which the template renders what is said."""
        found = []
        for role in ("system", "user", "assistant", "tool", "developer", "function"):
            asked = (Message("user", "one"), Message(role, "two")) if role != "system" else (Message(role, "two"),)
            with suppress(Refused):
                if "two" in self._template(asked, add_generation_prompt=False):
                    found.append(role)
        return found

    def _templates(self, dialogues: Sequence[Any], *, add_generation_prompt: bool) -> "list[str | Refused]":
        """Each as `_template` renders it; in one call, unless the template refuses any or rows give it more to read."""
        if not any(dialogue[0].context for dialogue in dialogues):
            with suppress(Refused):
                rendered: list[str | Refused] = self._applied(
                    [[message.for_template() for message in dialogue] for dialogue in dialogues], add_generation_prompt
                )
                return rendered
        found: list[str | Refused] = []
        for dialogue in dialogues:
            try:
                found.append(self._template(dialogue, add_generation_prompt=add_generation_prompt))
            except Refused as error:
                found.append(error)
        return found

    def _template(self, messages: Any, *, add_generation_prompt: bool) -> str:
        dialogue = [message.for_template() for message in messages]
        text: str = self._applied(dialogue, add_generation_prompt, **_context(messages))
        return text

    def _applied(self, dialogues: Any, add_generation_prompt: bool, **context: Any) -> Any:
        """The text of a dialogue, or of each of a list of them. Raises Refused."""
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            return self._tokenizer.apply_chat_template(
                dialogues,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **{"strftime_now": TEMPLATE_DATE.strftime} | context,
            )
        except TemplateSyntaxError as error:
            raise RequestError(f"prepare.chat_template: the template is not valid jinja: {error}") from None
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise Refused(f"the chat template refuses the dialogue: {error}") from None


def _context(messages: Sequence[Message]) -> dict[str, Any]:
    """What the dialogue's row gives the template beside messages."""
    found: dict[str, Any] = json.loads(messages[0].context) if messages and messages[0].context else {}
    own: dict[str, Any] = found.pop("chat_template_kwargs", {})
    return own | found


def _words(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _words(part)
