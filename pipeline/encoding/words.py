"""Byte-level BPE from memory: the words of a text repeat, and each distinct one is given to the tokenizer's model once.

Keeping account of where each piece of a text came from is most of what a fast tokenizer's time goes to. Here its own
pattern splits and its own model makes the ids, a fourth of the work; for texts of ASCII, Latin letters and the usual
dashes and quotes alone, where two regular-expression engines can't differ on what is a letter, a number or a space.
"""

import json
import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

import numpy as np

MOST_WORDS = 100_000  # remembered at once
CHECKED = 50  # one text in so many is compared with what the tokenizer makes of it

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
# U+017F and U+2000 to U+200F, U+2028 to U+202F are left out: an s by case folding, spaces and controls.
_USUAL = re.compile("[\x00-\x1b\x20-\x7e\u00a1-\u017e\u2010-\u2027\u2030-\u205e]*")
_ODD = "\x1c\x1d\x1e\x1f\x7f"  # of ASCII what is not among these
# Letters and numbers among these, as Unicode has had them since 1.1.
_CLASSES = {
    r"\p{L}": "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e",
    r"\p{N}": "0-9\u00b2\u00b3\u00b9\u00bc-\u00be",
}
# GPT-2's stand-ins for bytes that are no visible character; the others stand for themselves.
_INVISIBLE = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
_BYTES = {byte: chr(byte) for byte in range(256)} | {byte: chr(256 + n) for n, byte in enumerate(_INVISIBLE)}


class WordsDisagree(Exception):
    """The tokenizer gave other ids for a text than its words have."""


class WordMemory:
    """Token ids of texts, without the special tokens that a tokenizer adds by itself."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises ValueError for a tokenizer whose words can't be told so."""
        if not hasattr(tokenizer, "backend_tokenizer") or not type(tokenizer).__module__.startswith("transformers."):
            raise ValueError("a tokenizer in Python, or with code of its own")
        self._tokenizer = tokenizer
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        self._splits = [re.compile(_in_python(pattern), re.ASCII) for pattern in _patterns(parts)]
        _require_plain_bpe(parts)
        self._added = _any_of([token["content"] for token in parts["added_tokens"]])
        self._model = tokenizer.backend_tokenizer.model
        self._added_ids = {token["content"]: _packed([token["id"]]) for token in parts["added_tokens"]}
        self._ids: dict[str, bytes] = dict(self._added_ids)  # int32, as in memory
        self._seen = 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """int32 ids of each text; None for one that the tokenizer itself has to encode.

        Raises WordsDisagree where a text that is compared has other ids.
        """
        found = [self._encoded(text) for text in texts]
        compared = [i for i, ids in enumerate(found) if ids is not None and (self._seen + i) % CHECKED == 0]
        self._seen += len(texts)
        if compared:
            rows = self._tokenizer([texts[i] for i in compared], add_special_tokens=False, verbose=False)["input_ids"]
            for i, row in zip(compared, rows, strict=True):
                if not np.array_equal(np.asarray(found[i]), row):
                    raise WordsDisagree(texts[i])
        return found

    def _encoded(self, text: str) -> np.ndarray | None:
        if any(odd in text for odd in _ODD) if text.isascii() else not _USUAL.fullmatch(text):
            return None
        words: list[str] = []
        for number, part in enumerate(self._added.split(text) if self._added is not None else [text]):
            if number % 2:
                words.append(part)
                continue
            pieces = [part]
            for split in self._splits:
                pieces = [word for piece in pieces for word in split.findall(piece)]
            if sum(map(len, pieces)) != len(part):
                return None
            words += pieces
        return self._of_words(words)

    def _of_words(self, words: list[str]) -> np.ndarray:
        ids = self._ids
        try:
            return np.frombuffer(b"".join(map(ids.__getitem__, words)), dtype=np.int32)
        except KeyError:
            if len(ids) > MOST_WORDS:
                ids.clear()
                ids.update(self._added_ids)
            for word in set(words).difference(ids):
                ids[word] = _packed([token.id for token in self._model.tokenize(_visible(word))])
            return self._of_words(words)


def _packed(ids: list[int]) -> bytes:
    return np.array(ids, dtype=np.int32).tobytes()


def _visible(word: str) -> str:
    return "".join(map(_BYTES.__getitem__, word.encode()))


def _any_of(tokens: list[str]) -> re.Pattern[str] | None:
    """Matches the longest of these at a place; what all begin with goes first, which is quick to search for."""
    if not tokens:
        return None
    start = len(commonprefix(tokens))  # noqa: RUF071 - characters are meant
    ends = sorted((re.escape(token[start:]) for token in tokens), key=len, reverse=True)
    return re.compile(f"({re.escape(tokens[0][:start])}(?:{'|'.join(ends)}))")


def _patterns(parts: dict[str, Any]) -> list[str]:
    """The regular expressions that split a text into words, one after the other."""
    whole: dict[str, Any] = parts["pre_tokenizer"] or {}
    steps: list[dict[str, Any]] = whole["pretokenizers"] if whole.get("type") == "Sequence" else [whole]
    patterns = []
    for step in steps:
        if step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
            patterns += [_GPT2] * step["use_regex"]
        elif step.get("type") == "Digits" and step["individual_digits"]:
            patterns.append(r"\p{N}|[^\p{N}]+")  # Rust's is_numeric
        elif step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"]["Regex"])
        else:
            raise ValueError(f"no words by {step.get('type')}")
    if not patterns or steps[-1].get("type") != "ByteLevel":
        raise ValueError("not byte-level")
    return patterns


def _in_python(pattern: str) -> str:
    """The same expression in Python's syntax, for texts of _USUAL. Raises ValueError."""
    result, inside, i = "", False, 0
    while i < len(pattern):
        piece = next((name for name in _CLASSES if pattern.startswith(name, i)), None)
        if piece is not None:
            result += _CLASSES[piece] if inside else f"[{_CLASSES[piece]}]"
        else:
            piece = pattern[i : i + 2] if pattern[i] == "\\" else pattern[i]
            if piece.lower() == "\\p" or (piece == "[" and inside):
                raise ValueError(f"not in Python: {pattern}")
            inside = piece == "[" or (inside and piece != "]")
            result += piece
        i += len(piece)
    return result


def _require_plain_bpe(parts: dict[str, Any]) -> None:
    model, normalizer = parts["model"], parts["normalizer"]
    if model["type"] != "BPE" or any(
        model.get(name) for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise ValueError("not a plain BPE")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise ValueError(f"normalised by {normalizer['type']}")
    if any(token[flag] for token in parts["added_tokens"] for flag in ("lstrip", "rstrip", "single_word")):
        raise ValueError("added tokens that take white space along")
