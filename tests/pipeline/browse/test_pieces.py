"""The text of each token: joined it is what the tokenizer decodes, and no character is torn."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.browse.pieces import Splitter, open_splitter, utf16_length
from pipeline.errors import RequestError
from pipeline.model.tokenizer import END, train_tokenizer

TEXTS = ["plain words", "été", "日本語 and 👩‍🚀!", "\n\n \t", "a\u202eb\u2028", "\ufffd real", "é" * 40]


@pytest.fixture(scope="module")
def byte_level():
    """Of few merges, so that nearly every byte beyond ASCII is a token of its own."""
    return train_tokenizer(["plain words and more plain words"] * 3, 290).backend_tokenizer


@pytest.fixture(scope="module")
def word_marks():
    """As Llama 2's: a mark before each word, which decoding drops at the start of a text; bytes for the rest."""
    words = ["<unk>", "▁", "▁plain", "▁words", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def splitter(tokenizer):
    return Splitter(lambda ids: tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("text", TEXTS)
def test_characters_of_bytes_come_out_whole(byte_level, text):
    """Where a piece may end is read off the bytes: a byte that continues a character can't start one."""
    encoded = byte_level.encode(text, add_special_tokens=False)
    data = text.encode()
    # The offsets in bytes of each token, by the byte-level alphabet: one letter of a token's name stands for a byte.
    ends, at = [], 0
    for name in encoded.tokens:
        at += len(name)
        ends.append(at)
    assert at == len(data)
    whole = [end for end in ends if end == len(data) or data[end] & 0xC0 != 0x80]
    expected = [data[start:end].decode() for start, end in zip([0, *whole], whole, strict=False)]
    if "\ufffd" not in text:  # that very character looks unfinished, and shares a piece with what follows
        assert [piece.text for piece in splitter(byte_level).pieces(encoded.ids)] == expected


@pytest.mark.slow
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_joined_pieces_are_the_decoded_text_and_cover_every_token(byte_level, word_marks, data):
    """Whatever the ids: also such that no text encodes to, with characters cut at either end."""
    for tokenizer in (byte_level, word_marks):
        size = tokenizer.get_vocab_size()
        ids = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=12))
        found = splitter(tokenizer).pieces(ids)
        assert "".join(piece.text for piece in found) == tokenizer.decode(ids, skip_special_tokens=False)
        assert sum(piece.tokens for piece in found) == len(ids)
        assert all(piece.tokens >= 1 for piece in found)


def test_word_marks_inside_a_text_are_spaces(word_marks):
    ids = [word_marks.token_to_id(name) for name in ("▁plain", "▁words", "▁", "a", "<0xC3>", "<0xA9>", "b")]
    found = splitter(word_marks).pieces(ids)
    assert [(piece.text, piece.tokens) for piece in found] == [
        ("plain", 1), (" words", 1), (" ", 1), ("a", 1), ("é", 2), ("b", 1),
    ]  # fmt: skip


def test_a_decoder_that_rewrites_earlier_text_still_gives_the_whole():
    """Such as one that cleans up spaces before commas."""
    names = ["a", " ", ",", "b"]
    found = Splitter(lambda ids: "".join(names[i] for i in ids).replace(" ,", ",")).pieces([0, 1, 2, 3])
    assert "".join(piece.text for piece in found) == "a,b" and sum(piece.tokens for piece in found) == 4


def test_special_tokens_are_shown(byte_level, tmp_path):
    byte_level.save(str(tmp_path / "tokenizer.json"))
    ids = byte_level.encode(f"plain{END}", add_special_tokens=False).ids
    assert open_splitter(tmp_path).pieces(ids)[-1] == (1, END)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(RequestError, match="absent does not exist"):
        open_splitter(tmp_path / "absent")


@pytest.mark.parametrize("text, units", [("", 0), ("abc", 3), ("é", 1), ("日本", 2), ("👩‍🚀", 5)])
def test_lengths_are_javascripts(text, units):
    assert utf16_length(text) == units
