"""Prompts and responses -> token ids, once, for every later stage.

With a chat template: the prompt is rendered with the generation prompt, the whole dialogue is rendered too, and the
response is what the second adds to the first. Without: plain text and an end-of-sequence token. Either way a response
ends with its end-of-turn token, then both are cut to the limits. docs/data.md states the rules.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import date
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.encoding.dialogues import Answer, Message, Prompt, text_of
from pipeline.encoding.shortening import shortened
from pipeline.encoding.words import WordMemory
from pipeline.errors import RequestError

BATCH_TEXTS = 2000  # texts handed to the tokenizer at once: enough for all cores, few enough for memory

# Some templates (Llama 3.2) print today's date. Keys are made of token ids, so tomorrow every cached value would be
# void; this is the date that Llama's own template falls back to.
TEMPLATE_DATE = date(2024, 7, 26)


class Limits(NamedTuple):
    max_tokens: int  # prompt and response together; responses keep their start
    max_prompt_tokens: int
    long_prompts: Literal["drop", "truncate_left"]


class Encoded(NamedTuple):
    prompt_ids: np.ndarray  # int32, (prompt tokens,)
    response_ids: np.ndarray  # int32, (response tokens,), with the end-of-turn token unless truncated
    truncated: bool  # the response lost its end
    prompt_truncated: bool  # the prompt lost its left side


class Unusable(NamedTuple):
    reason: str
    prompt_too_long: bool = False  # dropped by prepare.long_prompts; not a bad row


class _Refused(ValueError):
    """Why the chat template renders no usable text for one dialogue."""


class _Start(NamedTuple):
    """A prompt as it is encoded, possibly shortened.

    text: up to the response; text_ids: of that text, without a closing eos; ids: what is kept of them.
    """

    prompt: Prompt
    text: str
    text_ids: np.ndarray
    ids: np.ndarray
    shortened: bool = False


# What a generation prompt may end with that the rendering of an assistant's turn need not begin with.
_THINK = re.compile(r"<think>\s*(</think>\s*)?\Z")
_WORD_MARKS = ("▁", "Ġ")
# Texts to encode a response behind, one of which does not become part of its first token.
_CONTEXTS = ("\n", ".", "0", "z")


class Encoder:
    """Renders and tokenises with one tokenizer, one template choice and one set of limits.

    chat: render with the tokenizer's chat template (prompts must be messages); otherwise prompts must be text.
    """

    def __init__(self, tokenizer: Any, *, chat: bool, limits: Limits, words: bool = True) -> None:
        """words: take the ids of texts from those of their words, where the tokenizer allows it (encoding/words.py)."""
        self._tokenizer = tokenizer
        self._chat = chat
        self._limits = limits
        self._ends = _end_tokens(tokenizer)
        self.special_tokens = sorted({tokenizer.convert_ids_to_tokens(token) for token in self._ends})
        self.unrendered: Counter[str] = Counter()  # distinct prompts or responses whose field the template drops
        self._adds_eos = not chat and _adds_eos(tokenizer)
        self._opening = 0 if chat else _opening(tokenizer)
        self._marks_beginnings = _marks_beginnings(tokenizer)
        self._blank: dict[int, bool] = {}
        self._words: WordMemory | None = None
        with suppress(ValueError):
            self._words = WordMemory(tokenizer) if words else None

    def encode(self, examples: Sequence[tuple[Prompt, Answer]]) -> list[Encoded | Unusable]:
        """One result per (prompt, response), in order; equal texts are worked on once."""
        distinct = list(dict.fromkeys(examples))
        starts = self._starts(list(dict.fromkeys(prompt for prompt, _ in distinct)))
        results: dict[tuple[Prompt, Answer], Encoded | Unusable] = {}
        texts: dict[tuple[Prompt, Answer], tuple[_Start, str]] = {}
        startable: list[tuple[tuple[Prompt, Answer], _Start]] = []
        for example in distinct:
            start = starts[example[0]]
            if isinstance(start, Unusable):
                results[example] = start
            else:
                startable.append((example, start))
        for (example, start), text in zip(startable, self._added_texts(startable), strict=True):
            if isinstance(text, _Refused):
                results[example] = Unusable(str(text))
            else:
                texts[example] = start, text
        for example, ids in self._responses(texts).items():
            start = texts[example][0]
            results[example] = ids if isinstance(ids, Unusable) else self._finish(start, ids)
        return [results[example] for example in examples]

    def _starts(self, prompts: Sequence[Prompt]) -> dict[Prompt, "_Start | Unusable"]:
        """Every prompt as it goes before its responses, the same for all of them; or why it can't."""
        starts: dict[Prompt, _Start | Unusable] = {}
        texts: dict[Prompt, str] = {}
        rendered = self._templates(prompts, add_generation_prompt=True) if self._chat else map(_plain, prompts)
        for prompt, text in zip(prompts, rendered, strict=True):
            try:
                texts[prompt] = self._start_text(prompt, text)
            except _Refused as error:
                starts[prompt] = Unusable(str(error))
        ids = self._tokenise(texts.values(), special=not self._chat)
        for prompt, text in texts.items():
            found = ids[text]
            if self._adds_eos:
                found = found[:-1]  # the answer follows here; the sequence is not over
            try:
                starts[prompt] = self._within_limits(_Start(prompt, text, found, found))
            except _Refused as error:
                starts[prompt] = Unusable(f"shortened to prepare.max_prompt_tokens: {error}")
        return starts

    def _within_limits(self, start: _Start) -> "_Start | Unusable":
        """The prompt's limit, by the policy for long prompts."""
        most = self._limits.max_prompt_tokens
        if len(start.ids) == 0:
            return Unusable("the prompt has no tokens")
        if len(start.ids) <= most:
            return start
        if self._limits.long_prompts == "drop":
            return Unusable(f"the prompt has {len(start.ids)} tokens, more than {most}", prompt_too_long=True)
        if not self._chat:
            opening = start.ids[: self._opening]
            if len(opening) >= most:
                return Unusable(f"the tokenizer opens a text with {len(opening)} tokens already", prompt_too_long=True)
            end = start.ids[len(start.ids) - most + len(opening) :]
            return start._replace(ids=np.append(opening, end), shortened=True)
        assert not isinstance(start.prompt, str)
        shorter = shortened(start.prompt, lambda messages: len(self._chat_start(messages).ids) <= most)
        if shorter is None:
            reason = f"the prompt has {len(start.ids)} tokens, more than {most}, also without its contents"
            return Unusable(reason, prompt_too_long=True)
        return self._chat_start(shorter)._replace(shortened=True)

    def _chat_start(self, messages: tuple[Message, ...]) -> _Start:
        text = self._start_text(messages, self._template(messages, add_generation_prompt=True))
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found = np.asarray(ids, np.int32)
        return _Start(messages, text, found, found)

    def _start_text(self, prompt: Prompt, text: "str | _Refused") -> str:
        """The text before a response; of a chat without a block of thoughts that its generation prompt ends with.

        text: the prompt as rendered, or why not. Raises _Refused.
        """
        if isinstance(text, _Refused):
            raise text
        if not self._chat:
            return text
        self._require_all_turns(prompt, text)
        assert isinstance(prompt[0], Message)
        if prompt[0].context:
            context = json.loads(prompt[0].context)
            settings = context.pop("chat_template_kwargs", {})
            self._note_unrendered(context, text)
            self.unrendered.update(name for name in settings if name not in str(self._tokenizer.chat_template))
        return _THINK.sub("", text)

    def _unclosed(self, content: str) -> str:
        """Without the special tokens that a text which was rendered before ends with; the template closes it again."""
        ends = tuple(self.special_tokens)
        stripped = content.rstrip()
        while stripped.endswith(ends):
            token = max((end for end in ends if stripped.endswith(end)), key=len)
            content = stripped = stripped.removesuffix(token).rstrip()
        return content

    def _note_unrendered(self, fields: dict[str, Any], text: str) -> None:
        """Count the fields of which no word is in the text."""
        for name, value in fields.items():
            words = [word for word in _words(value) if word.strip()]
            if words and not any(word.strip() in text for word in words):
                self.unrendered[name] += 1

    def _require_all_turns(self, prompt: Prompt, text: str) -> None:
        """_Refused for a turn of which the template renders nothing, as of a role that it does not know."""
        for number, message in enumerate(prompt):
            assert isinstance(message, Message)
            said = message.content.strip()
            if said and said not in text:
                silent = (*prompt[:number], message._replace(content=""), *prompt[number + 1 :])
                if self._template(silent, add_generation_prompt=True) == text:
                    raise _Refused(
                        f"the chat template renders nothing of turn {number + 1}, whose role is {message.role!r}; it "
                        f"renders {', '.join(self._known_roles())}"
                    )

    def _known_roles(self) -> list[str]:
        """The usual roles of which the template renders what is said."""
        found = []
        for role in ("system", "user", "assistant", "tool", "developer", "function"):
            asked = (Message("user", "one"), Message(role, "two")) if role != "system" else (Message(role, "two"),)
            with suppress(_Refused):
                if "two" in self._template(asked, add_generation_prompt=False):
                    found.append(role)
        return found

    def _added_texts(self, examples: Sequence[tuple[tuple[Prompt, Answer], _Start]]) -> "list[str | _Refused]":
        """What each response's text is after its prompt's, or why it can't be told."""
        if not self._chat:
            return [text_of(response) for (_, response), _ in examples]
        lasts = [self._last_turn(response) for (_, response), _ in examples]
        wholes = self._templates(
            [(*start.prompt, last) for last, (_, start) in zip(lasts, examples, strict=True)],
            add_generation_prompt=False,
        )
        found: list[str | _Refused] = []
        for (_, start), last, whole in zip(examples, lasts, wholes, strict=True):
            try:
                found.append(self._added(start, last, whole))
            except _Refused as error:
                found.append(error)
        return found

    def _last_turn(self, response: Answer) -> Message:
        last = Message("assistant", response) if isinstance(response, str) else response
        return last._replace(content=self._unclosed(last.content))

    def _added(self, start: _Start, last: Message, whole: "str | _Refused") -> str:
        """What the whole dialogue adds to its prompt. Raises _Refused where it does not begin with it."""
        if isinstance(whole, _Refused):
            raise whole
        if last.extra:
            self._note_unrendered(json.loads(last.extra), whole[len(start.text) :])
        if not whole.startswith(start.text):
            common = next((i for i, (a, b) in enumerate(zip(start.text, whole, strict=False)) if a != b), len(whole))
            raise _Refused(
                "the chat template renders the dialogue so that it does not begin with its own prompt, so the response "
                f"can't be told from it: the prompt goes on with {start.text[common:][:60]!r}, the dialogue with "
                f"{whole[common:][:60]!r}. Set prepare.chat_template to a jinja file whose generation prompt is how an "
                "assistant's turn begins, or to never"
            )
        return whole[len(start.text) :]

    def _responses(
        self, texts: dict[tuple[Prompt, Answer], tuple[_Start, str]]
    ) -> dict[tuple[Prompt, Answer], "np.ndarray | Unusable"]:
        """The ids of each text after its prompt."""
        if not self._marks_beginnings:
            alone = self._tokenise((text for _, text in texts.values()), special=False)
            return {example: alone[text] for example, (_, text) in texts.items()}
        wholes = self._tokenise((start.text + text for start, text in texts.values()), special=not self._chat)
        if self._adds_eos:  # its own goes, as from the prompts; the response is closed later
            wholes = {text: ids[:-1] for text, ids in wholes.items()}
        return {
            example: self._after(start, text, wholes[start.text + text]) for example, (start, text) in texts.items()
        }

    def _after(self, start: _Start, text: str, whole: np.ndarray) -> "np.ndarray | Unusable":
        """The response's ids where tokenizers mark the beginning of a text: what follows the prompt in the whole.

        Where a token would lie on both sides, the prompt keeps its own ids, as at generation, and the response is
        encoded as it is anywhere but at a beginning.
        """
        own = start.text_ids
        if len(whole) >= len(own) and np.array_equal(whole[: len(own)], own):
            return whole[len(own) :]
        for context in _CONTEXTS:
            before, after = (
                np.asarray(self._tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"], np.int32)
                for t in (context, context + text)
            )
            if len(after) > len(before) and np.array_equal(after[: len(before)], before):
                return after[len(before) :]
        return Unusable("the tokenizer makes one token of the end of the prompt and the beginning of the response")

    def _templates(self, dialogues: Sequence[Any], *, add_generation_prompt: bool) -> "list[str | _Refused]":
        """Each as `_template` renders it; in one call, unless the template refuses any or rows give it more to read."""
        if not any(dialogue[0].context for dialogue in dialogues):
            with suppress(_Refused):
                rendered: list[str | _Refused] = self._applied(
                    [[message.for_template() for message in dialogue] for dialogue in dialogues], add_generation_prompt
                )
                return rendered
        found: list[str | _Refused] = []
        for dialogue in dialogues:
            try:
                found.append(self._template(dialogue, add_generation_prompt=add_generation_prompt))
            except _Refused as error:
                found.append(error)
        return found

    def _template(self, messages: Any, *, add_generation_prompt: bool) -> str:
        dialogue = [message.for_template() for message in messages]
        text: str = self._applied(dialogue, add_generation_prompt, **_context(messages))
        return text

    def _applied(self, dialogues: Any, add_generation_prompt: bool, **context: Any) -> Any:
        """The text of a dialogue, or of each of a list of them. Raises _Refused."""
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
            raise _Refused(f"the chat template refuses the dialogue: {error}") from None

    def _tokenise(self, texts: Iterable[str], *, special: bool) -> dict[str, np.ndarray]:
        """Token ids by text; special: with the special tokens that the tokenizer adds by itself."""
        distinct = list(dict.fromkeys(texts))
        ids: dict[str, np.ndarray] = {}
        if self._words is not None and not special:
            remembered = zip(distinct, self._words.encode(distinct), strict=True)
            ids = {text: found for text, found in remembered if found is not None}
            distinct = [text for text in distinct if text not in ids]
        for start in range(0, len(distinct), BATCH_TEXTS):
            chunk = distinct[start : start + BATCH_TEXTS]
            rows = self._tokenizer(
                chunk,
                add_special_tokens=special,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            # At once: as Python lists, a large dataset's ids would take several times the memory.
            ids.update((text, np.asarray(row, dtype=np.int32)) for text, row in zip(chunk, rows, strict=True))
        return ids

    def _finish(self, start: _Start, response_ids: np.ndarray) -> Encoded | Unusable:
        """The end-of-turn rule, then the limit of both: the response gets the room left."""
        if len(response_ids) == 0:
            return Unusable("the response has no tokens")
        response_ids = self._close_turn(response_ids)
        room = self._limits.max_tokens - len(start.ids)
        truncated = len(response_ids) > room
        return Encoded(start.ids, response_ids[:room], truncated=truncated, prompt_truncated=start.shortened)

    def _close_turn(self, ids: np.ndarray) -> np.ndarray:
        """`ids` up to its last end token if only white space follows it (templates add a line break); else with eos."""
        last = len(ids) - 1
        while last >= 0 and int(ids[last]) not in self._ends and self._is_blank(int(ids[last])):
            last -= 1
        if last >= 0 and int(ids[last]) in self._ends:
            return ids[: self._first_of_run(ids, last) + 1]
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise RequestError(
                "the tokenizer has no end-of-sequence token and the chat template ends no turn with a special token, "
                "so a response would never end. Use a model whose tokenizer has one, or a prepare.chat_template that "
                "closes the assistant's turn with a special token."
            )
        return np.append(ids, np.int32(eos))

    def _first_of_run(self, ids: np.ndarray, last: int) -> int:
        """Where the end token at `last` stands first, if nothing but itself and white space lies between."""
        first = place = last
        while place > 0 and (ids[place - 1] == ids[last] or self._is_blank(int(ids[place - 1]))):
            place -= 1
            if ids[place] == ids[last]:
                first = place
        return first

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip() and token not in self._ends
        return self._blank[token]


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


def _plain(prompt: Prompt) -> str:
    assert isinstance(prompt, str)  # parsed for a tokenizer without a template
    return prompt


def _end_tokens(tokenizer: Any) -> frozenset[int]:
    """Special tokens that may end a turn; the end-of-turn token is often not the eos token, and not always declared."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    special.discard(tokenizer.unk_token_id)  # a rare character at the end of a text ends nothing
    return frozenset(special | ({tokenizer.eos_token_id} - {None}))


def _adds_eos(tokenizer: Any) -> bool:
    ids = tokenizer("a", verbose=False)["input_ids"]
    return len(ids) > 0 and ids[-1] == tokenizer.eos_token_id


def _opening(tokenizer: Any) -> int:
    """How many special tokens the tokenizer puts before every text by itself."""
    alone, framed = (tokenizer("a", add_special_tokens=s, verbose=False)["input_ids"] for s in (False, True))
    return next((i for i in range(len(framed)) if framed[i : i + len(alone)] == alone), 0)


def _marks_beginnings(tokenizer: Any) -> bool:
    """Whether a text alone has other tokens than the same text after another, as SentencePiece's word mark makes it."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    return bool(tokens) and str(tokens[0]).startswith(_WORD_MARKS)
