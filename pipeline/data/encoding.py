"""Prompts and responses -> token ids, once, for every later stage.

With a chat template: the prompt is rendered with the generation prompt, the whole dialogue is rendered too, and the
response is what the second adds to the first. Without: plain text and an end-of-sequence token. Either way a response
ends with its end-of-turn token, then both are cut to the limits.
"""

from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.data.dialogues import Message, Prompt
from pipeline.errors import RequestError
from pipeline.progress import progress_bar

BATCH_TEXTS = 2000  # texts handed to the tokenizer at once: enough for all cores, little enough for a moving bar

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
    """Why the chat template renders no text for one dialogue."""


class Encoder:
    """Renders and tokenises with one tokenizer, one template choice and one set of limits.

    chat: render with the tokenizer's chat template (prompts must be messages); otherwise prompts must be text.
    """

    def __init__(self, tokenizer: Any, *, chat: bool, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._limits = limits
        self._ends = _end_tokens(tokenizer)
        self._adds_eos = not chat and _adds_eos(tokenizer)
        self._blank: dict[int, bool] = {}
        self._prompt_texts: dict[Prompt, str] = {}

    def encode(self, examples: Sequence[tuple[Prompt, str]], label: str = "rows") -> list[Encoded | Unusable]:
        """One result per (prompt, response), in order; equal texts are worked on once."""
        texts: dict[tuple[Prompt, str], tuple[str, str]] = {}
        results: dict[tuple[Prompt, str], Encoded | Unusable] = {}
        for example in dict.fromkeys(examples):
            try:
                texts[example] = self._render_chat(example) if self._chat else (_plain(example[0]), example[1])
            except _Refused as error:
                results[example] = Unusable(str(error))
        prompts = self._tokenise((prompt for prompt, _ in texts.values()), f"{label}: prompts", special=not self._chat)
        responses = self._tokenise((response for _, response in texts.values()), f"{label}: responses", special=False)
        for example, (prompt, response) in texts.items():
            results[example] = self._finish(prompts[prompt], responses[response])
        return [results[example] for example in examples]

    def _render_chat(self, example: tuple[Prompt, str]) -> tuple[str, str]:
        """(the prompt with its generation prompt, what the whole dialogue adds to it), both as text."""
        prompt, response = example
        start = self._prompt_texts.get(prompt)
        if start is None:
            start = self._prompt_texts[prompt] = self._template(prompt, add_generation_prompt=True)
        whole = self._template((*prompt, Message("assistant", response)), add_generation_prompt=False)
        if not whole.startswith(start):
            raise RequestError(
                "the chat template renders a dialogue so that it does not begin with its own prompt; the response "
                f"cannot be told from the prompt.\n  end of the prompt with generation prompt: {start[-120:]!r}\n"
                f"  same place in the whole dialogue: {whole[max(0, len(start) - 120) :][:160]!r}\n"
                "Set prepare.chat_template to a jinja file whose generation prompt is exactly how an assistant's turn "
                "begins, or to never."
            )
        return start, whole[len(start) :]

    def _template(self, messages: Any, *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            text: str = self._tokenizer.apply_chat_template(
                [message._asdict() for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                strftime_now=TEMPLATE_DATE.strftime,
            )
            return text
        except TemplateSyntaxError as error:
            raise RequestError(f"prepare.chat_template: the template is not valid jinja: {error}") from None
        except TemplateError as error:
            raise _Refused(f"the chat template refuses the dialogue: {error}") from None

    def _tokenise(self, texts: Iterable[str], label: str, *, special: bool) -> dict[str, np.ndarray]:
        """Token ids by text; special: with the special tokens that the tokenizer adds by itself."""
        distinct = list(dict.fromkeys(texts))
        ids: dict[str, np.ndarray] = {}
        with progress_bar(f"tokenise {label}", len(distinct)) as advance:
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
                advance(len(chunk))
        return ids

    def _finish(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> Encoded | Unusable:
        """The end-of-turn rule, then the limits: first the prompt's policy, then the response gets the room left."""
        if self._adds_eos:
            prompt_ids = prompt_ids[:-1]  # the answer follows here; the sequence is not over
        if len(prompt_ids) == 0:
            return Unusable("the prompt has no tokens")
        if len(response_ids) == 0:
            return Unusable("the response has no tokens")
        long = len(prompt_ids) > self._limits.max_prompt_tokens
        if long and self._limits.long_prompts == "drop":
            limit = self._limits.max_prompt_tokens
            return Unusable(f"the prompt has {len(prompt_ids)} tokens, more than {limit}", prompt_too_long=True)
        if long:
            prompt_ids = prompt_ids[-self._limits.max_prompt_tokens :]
        response_ids = self._close_turn(response_ids)
        room = self._limits.max_tokens - len(prompt_ids)
        return Encoded(prompt_ids, response_ids[:room], truncated=len(response_ids) > room, prompt_truncated=long)

    def _close_turn(self, ids: np.ndarray) -> np.ndarray:
        """`ids` up to its last end token if only white space follows it (templates add a line break); else with eos."""
        last = len(ids) - 1
        while last >= 0 and int(ids[last]) not in self._ends and self._is_blank(int(ids[last])):
            last -= 1
        if last >= 0 and int(ids[last]) in self._ends:
            return ids[: last + 1]
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise RequestError(
                "the tokenizer has no end-of-sequence token and the chat template ends no turn with a special token, "
                "so a response would never end. Use a model whose tokenizer has one, or a prepare.chat_template that "
                "closes the assistant's turn with a special token."
            )
        return np.append(ids, np.int32(eos))

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
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
