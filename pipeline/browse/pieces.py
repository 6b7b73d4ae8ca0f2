"""The text of each token of a response, so that the pieces joined are the response as its tokenizer decodes it.

Byte-level tokenizers cut characters of several bytes apart, and SentencePiece's word marks depend on what stands
before; so a token has no text of its own. Tokens whose bytes make one character share a piece.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline.model.tokenizer import open_prepared_tokenizer

UNFINISHED = "�"  # what a decoder shows for bytes that make no character (yet)

Decode = Callable[[list[int]], str]


class Piece(NamedTuple):
    """Text that `tokens` consecutive tokens make, which is empty where they show nothing."""

    tokens: int
    text: str


class Splitter:
    """Cuts token ids into pieces."""

    def __init__(self, decode: Decode) -> None:
        """decode: token ids to text, special tokens included."""
        self._decode = decode
        self._alone: dict[int, str] = {}

    def pieces(self, ids: list[int]) -> list[Piece]:
        """The pieces of `ids`, whose texts joined are decode(ids) and whose tokens add up to len(ids)."""
        text = self._decode(ids)
        # From cheap to dear; each is right where it gives the text again, and the last one always does.
        for split in (self._by_token, self._in_context):
            found = split(ids)
            if "".join(piece.text for piece in found) == text:
                return found
        return self._by_beginnings(ids, text)

    def _by_token(self, ids: list[int]) -> list[Piece]:
        """Each token as it decodes alone: enough for byte-level tokenizers, where no character is cut."""
        for token in set(ids).difference(self._alone):
            self._alone[token] = self._decode([token])
        return [Piece(1, self._alone[token]) for token in ids]

    def _in_context(self, ids: list[int]) -> list[Piece]:
        """What each token adds to those of the piece before."""
        found = list[Piece]()
        before = start = 0  # where the piece before starts, and the one that is being made
        for end in range(1, len(ids) + 1):
            text = self._decode(ids[before:end])
            if text.endswith(UNFINISHED) and end < len(ids):
                continue
            known = self._decode(ids[before:start]) if start > before else ""
            found.append(Piece(end - start, text[len(known) :]))
            before, start = start, end
        return found

    def _by_beginnings(self, ids: list[int], text: str) -> list[Piece]:
        """A piece ends wherever the tokens up to there decode to a beginning of the text: quadratic in tokens."""
        found = list[Piece]()
        start = shown = 0
        for end in range(1, len(ids) + 1):
            beginning = self._decode(ids[:end])
            grown = len(beginning) >= shown and not beginning.endswith(UNFINISHED) and text.startswith(beginning)
            if grown or end == len(ids):
                stop = len(beginning) if grown else len(text)
                found.append(Piece(end - start, text[shown:stop]))
                start, shown = end, stop
        if shown < len(text):  # the last beginning is the text itself, unless decoding depends on what follows
            found[-1] = Piece(found[-1].tokens, found[-1].text + text[shown:])
        return found


def open_splitter(folder: Path, *, trust_remote_code: bool = False) -> Splitter:
    """With the tokenizer that `prepare` published in `folder`; RequestError where there is none."""
    fast = folder / "tokenizer.json"
    if fast.is_file():
        from tokenizers import Tokenizer  # a second faster to load than transformers

        tokenizer = Tokenizer.from_file(str(fast))
        return Splitter(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)))
    slow = open_prepared_tokenizer(folder, trust_remote_code=trust_remote_code)
    return Splitter(lambda ids: str(slow.decode(ids, skip_special_tokens=False)))


def utf16_length(text: str) -> int:
    """Length as JavaScript counts it."""
    return len(text) if text.isascii() else len(text.encode("utf-16-le")) // 2
