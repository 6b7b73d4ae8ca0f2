"""Token ids from the memory of words are the tokenizer's own, or the tokenizer is asked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.encoding.words import WordMemory, WordsDisagree
from pipeline.model.tokenizer import train_tokenizer
from pipeline.params import ModelParams
from tests.pipeline.data.preparing import digests, file_params, pair_rows, prepare_into, write_jsonl

# As their publishers' tokenizer.json files have them.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPECIAL = ["<|end|>", "<|endoftext|>", "<x>"]
TEXTS = ["It isn't 12345 things, is it?\n\n  No —  “it’s” naïve.", "def f(x):\n    return x ** 2  # ½\r\n\t"] * 3
# Merges that a letter or number taken for something else would break.
TEXTS += ["aªb cºd 2²3 5¾6 xéßÆøŉz µm"] * 9


def trained(pre_tokenizer, normalizer=None):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def split(pattern):
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])


TOKENIZERS = {
    "qwen2": trained(split(QWEN2), normalizers.NFC()),
    "llama3": trained(split(LLAMA3)),
    "gpt2": trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "scratch": train_tokenizer(TEXTS, 400),
}
PIECES = st.one_of(
    st.text(st.sampled_from("abcXYZ's 019 .,-\n\r\t\f\v()_"), max_size=12),
    st.text(st.sampled_from("éßÆøŉſªº²¾«»­ ‘’“”—…\u2009\u0301İ中🙂\x1c\x7f\x85"), max_size=4),
    st.sampled_from([*SPECIAL, "<|end", "|>", "'S", "'ſ", "  \n ", "l'été", "don't", "<|user|>"]),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=4))
def test_ids_are_the_tokenizers_own(name, texts):
    tokenizer = TOKENIZERS[name]
    found = WordMemory(tokenizer).encode(texts)
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for ids, row in zip(found, expected, strict=True):
        assert ids is None or (ids.dtype == np.int32 and ids.tolist() == row)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_usual_texts_are_from_memory_and_odd_ones_are_not(name):
    memory = WordMemory(TOKENIZERS[name])
    assert all(ids is not None for ids in memory.encode([*TEXTS, "", "l’été — “½”…<|end|>\n"]))
    odd = ["中文", "🙂", "e\u0301", "a\u2009b", "a\x1cb", "\u017ft", "a\x85b", "a\xa0b", "­"]
    assert all(ids is None for ids in memory.encode(odd[:8]))


def test_memory_is_bounded_and_forgetting_changes_nothing(monkeypatch):
    monkeypatch.setattr("pipeline.encoding.words.MOST_WORDS", 5)
    memory, tokenizer = WordMemory(TOKENIZERS["qwen2"]), TOKENIZERS["qwen2"]
    for text in (*TEXTS, "other words here <x> and there<|end|>", *TEXTS):
        [ids] = memory.encode([text])
        assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: setattr(backend, "pre_tokenizer", split(r"\p{Lu}?\p{Ll}+|.")),
        lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
        lambda backend: setattr(backend, "normalizer", normalizers.NFKC()),
        lambda backend: setattr(backend.model, "dropout", 0.1),
    ],
    ids=["metaspace", "prefix space", "other classes", "lower case", "nfkc", "dropout"],
)
def test_tokenizers_of_other_kinds_are_asked_themselves(change):
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    change(tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"."):
        WordMemory(tokenizer)


def test_added_tokens_that_take_white_space_along_are_left_to_the_tokenizer():
    from tokenizers import AddedToken

    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens([AddedToken("<y>", lstrip=True)])
    with pytest.raises(ValueError, match="white space"):
        WordMemory(tokenizer)


def test_so_are_tokenizers_with_code_of_their_own():
    class Own(PreTrainedTokenizerFast):
        pass

    class InPython:
        pass

    with pytest.raises(ValueError, match="code of its own"):
        WordMemory(Own(tokenizer_object=TOKENIZERS["qwen2"].backend_tokenizer))
    with pytest.raises(ValueError, match="in Python"):
        WordMemory(InPython())


def test_wrong_ids_are_found_and_prepare_begins_again_without_the_memory(tmp_path, monkeypatch, capsys):
    tokenizer = TOKENIZERS["qwen2"]
    memory = WordMemory(tokenizer)
    memory._ids["It"] = b"\x07\x00\x00\x00"
    with pytest.raises(WordsDisagree):
        memory.encode(TEXTS)
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "in/pairs.jsonl", pair_rows(60))
    params, model = file_params(tmp_path / "in", sft={"source": "none"}), ModelParams(name=str(tmp_path / "model"))
    prepare_into(tmp_path / "right", params, model)
    monkeypatch.setattr("pipeline.encoding.words._packed", lambda ids: np.array([*ids[::-1], 5], np.int32).tobytes())
    prepare_into(tmp_path / "again", params, model)
    assert "prepare: again, without encoding/words.py" in capsys.readouterr().err
    assert digests(tmp_path / "again") == digests(tmp_path / "right")
