"""Texts that, encoded, give the token ids of pairs: special tokens and chat markup are in them as text.

The prepared tables keep texts for people: without the template's markup, several turns headed by their roles.
"""

from collections.abc import Mapping, Sequence
from itertools import starmap
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
from jinja2 import TemplateError

Dialogue: TypeAlias = "Sequence[dict[str, str]]"  # turns of a role and a content

CHECKED = 2_000  # pairs, at least, where a split has so many


class Rendered(NamedTuple):
    """Of some pairs, one text each: the prompt without the special tokens that the tokenizer adds by itself."""

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]


class Texts:
    """A tokenizer as it is needed here, and the count of what was checked."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._added = tokenizer("")["input_ids"]  # of an empty text: a beginning-of-text token, or nothing
        self.checked = self.same = 0

    @property
    def end(self) -> str:
        """The end-of-sequence token as text, or nothing."""
        return self.tokenizer.eos_token or ""

    def render(self, pairs: pa.Table) -> Rendered:
        """Texts of the prompt_ids, chosen_ids and rejected_ids of `pairs`."""
        ids = {side: pairs[f"{side}_ids"].to_pylist() for side in ("prompt", "chosen", "rejected")}
        added = self._added
        heads = [row[len(added) :] if row[: len(added)] == added else row for row in ids["prompt"]]
        prompts = self._decoded(heads)
        return Rendered(prompts, *(self._answers(prompts, heads, ids[side]) for side in ("chosen", "rejected")))

    def _answers(self, prompts: list[str], heads: list[list[int]], answers: list[list[int]]) -> list[str]:
        # Some tokenizers decode an answer that stands alone without the space before its first word.
        wholes = self._decoded([head + answer for head, answer in zip(heads, answers, strict=True)])
        return [
            whole[len(prompt) :] if whole.startswith(prompt) else self._decoded([answer])[0]
            for prompt, whole, answer in zip(prompts, wholes, answers, strict=True)
        ]

    def _decoded(self, rows: list[list[int]]) -> list[str]:
        found: list[str] = self.tokenizer.batch_decode(
            rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return found

    def check(self, pairs: pa.Table, rendered: Rendered, every: int) -> None:
        """Count, of each pair whose id `every` divides, whether encoding the texts gives its token ids.

        As TRL 1.16 encodes plain texts: the prompt alone, and prompt and answer as one text, which it ends with the
        end-of-sequence token where it doesn't.
        """
        rows = _picked(pairs, every)
        if rows:
            picked = pairs.take(rows)
            prompts, *answers = ([texts[row] for row in rows] for texts in rendered)
            ids = [picked[f"{side}_ids"].to_pylist() for side in ("prompt", "chosen", "rejected")]
            alike = [_same(self._encoded(prompts), ids[0])]
            for texts, theirs in zip(answers, ids[1:], strict=True):
                wholes = [
                    prompt + text + ("" if text.endswith(self.end) else self.end)
                    for prompt, text in zip(prompts, texts, strict=True)
                ]
                expected = [prompt + answer for prompt, answer in zip(ids[0], theirs, strict=True)]
                alike.append(_same(self._encoded(wholes), expected))
            self.checked += len(rows)
            self.same += sum(map(all, zip(*alike, strict=True)))

    def check_dialogues(self, pairs: pa.Table, dialogues: Sequence[Mapping[str, Dialogue]], every: int) -> None:
        """As `check`, of dialogues by side: whether the tokenizer's template gives just the token ids of a pair.

        Nothing is counted where the tokenizer has no template.
        """
        if not self.tokenizer.chat_template:
            return
        rows = _picked(pairs, every)
        for row, ids in zip(rows, pairs.take(rows).to_pylist(), strict=True):
            self.checked += 1
            self.same += all(
                self._templated(dialogues[row][side]) == ids["prompt_ids"] + ids[f"{side}_ids"]
                for side in ("chosen", "rejected")
            )

    def _templated(self, dialogue: Dialogue) -> list[int] | None:
        try:
            found: list[int] = self.tokenizer.apply_chat_template(list(dialogue), tokenize=True, return_dict=False)
        except TemplateError:  # it refuses such turns
            return None
        return found

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts)["input_ids"]
        return found

    def without_end(self, text: str) -> str:
        return text.removesuffix(self.end) if self.end else text


def _picked(pairs: pa.Table, every: int) -> list[int]:
    return [row for row, number in enumerate(pairs["pair_id"].to_pylist()) if number % every == 0]


def check_every(n_pairs: int) -> int:
    return max(1, n_pairs // CHECKED)


def _same(found: Sequence[list[int]], expected: Sequence[list[int]]) -> list[bool]:
    return list(starmap(list.__eq__, zip(found, expected, strict=True)))
