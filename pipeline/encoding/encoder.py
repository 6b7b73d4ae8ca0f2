"""Prompts and responses -> token ids, once, for every later stage.

With a chat template: the prompt is rendered with the generation prompt, the whole dialogue is rendered too, and the
response is what the second adds to the first. Without: plain text and an end-of-sequence token. Either way a response
ends with its end-of-turn token, then both are cut to the limits. docs/data.md states the rules.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.encoding.dialogues import Answer, Message, Prompt, text_of
from pipeline.encoding.rendering import Refused, Renderer
from pipeline.encoding.shortening import shortened
from pipeline.encoding.words import WordMemory
from pipeline.errors import RequestError

BATCH_TEXTS = 2000  # texts handed to the tokenizer at once: enough for all cores, few enough for memory


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


class _Start(NamedTuple):
    """A prompt as it is encoded, possibly shortened.

    text: up to the response; text_ids: of that text, without a closing eos; ids: what is kept of them.
    """

    prompt: Prompt
    text: str
    text_ids: np.ndarray
    ids: np.ndarray
    shortened: bool = False


_WORD_MARKS = ("▁", "Ġ")
# Texts to encode a response behind, one of which does not become part of its first token.
_CONTEXTS = ("\n", ".", "0", "z")


class Encoder:
    """Renders and tokenises with one tokenizer, one template choice and one set of limits.

    chat: render with the tokenizer's chat template (prompts must be messages); otherwise prompts must be text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: bool,
        limits: Limits,
        after_end: Literal["drop", "keep"] = "drop",
        words: bool = True,
    ) -> None:
        """after_end: what becomes of the white space that a chat template writes behind the end of a response.

        words: take the ids of texts from those of their words, where the tokenizer allows it (encoding/words.py).
        """
        self._tokenizer = tokenizer
        self._chat = chat
        self._limits = limits
        self._keeps_after_end = chat and after_end == "keep"
        self._ends = _end_tokens(tokenizer)
        self.special_tokens = sorted({tokenizer.convert_ids_to_tokens(token) for token in self._ends})
        self._renderer = Renderer(tokenizer, self.special_tokens) if chat else None
        self._adds_eos = not chat and _adds_eos(tokenizer)
        self._opening = 0 if chat else _opening(tokenizer)
        self._marks_beginnings = _marks_beginnings(tokenizer)
        self._blank: dict[int, bool] = {}
        self._words: WordMemory | None = None
        with suppress(ValueError):
            self._words = WordMemory(tokenizer) if words else None

    @property
    def unrendered(self) -> Counter[str]:
        """Distinct prompts or responses by the field of which the template rendered nothing."""
        return self._renderer.unrendered if self._renderer is not None else Counter()

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
        for (example, start), text in zip(startable, self._added(startable), strict=True):
            if isinstance(text, Refused):
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
        rendered = self._renderer.prompts(prompts) if self._renderer is not None else map(_plain, prompts)
        for prompt, text in zip(prompts, rendered, strict=True):
            if isinstance(text, Refused):
                starts[prompt] = Unusable(str(text))
            else:
                texts[prompt] = text
        ids = self._tokenise(texts.values(), special=not self._chat)
        for prompt, text in texts.items():
            found = ids[text]
            if self._adds_eos:
                found = found[:-1]  # the answer follows here; the sequence is not over
            try:
                starts[prompt] = self._within_limits(_Start(prompt, text, found, found))
            except Refused as error:
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
        if self._renderer is None:
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
        assert self._renderer is not None
        [text] = self._renderer.prompts([messages])
        if isinstance(text, Refused):
            raise text
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found = np.asarray(ids, np.int32)
        return _Start(messages, text, found, found)

    def _added(self, examples: Sequence[tuple[tuple[Prompt, Answer], _Start]]) -> "Sequence[str | Refused]":
        """What each response's text is after its prompt's, or why it can't be told."""
        if self._renderer is None:
            return [text_of(response) for (_, response), _ in examples]
        return self._renderer.added([(start.prompt, start.text, response) for (_, response), start in examples])

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
        """`ids` up to its last end token if only white space follows it (templates add a line break), and with
        after_end "keep" to that's end; else with eos."""
        last = len(ids) - 1
        while last >= 0 and int(ids[last]) not in self._ends and self._is_blank(int(ids[last])):
            last -= 1
        if last >= 0 and int(ids[last]) in self._ends:
            until_end = ids[: self._first_of_run(ids, last) + 1]
            return np.append(until_end, ids[last + 1 :]) if self._keeps_after_end else until_end
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
