import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.encoding.dialogues import Message
from pipeline.encoding.encoder import Encoder, Limits
from pipeline.errors import RequestError
from pipeline.model.tokenizer import load_tokenizer, read_template, train_tokenizer
from pipeline.params import ModelParams
from tests.pipeline.data import chat_tokenizers
from tests.pipeline.data.preparing import digests

CORPUS = ["Compute 12 + 30.", "12 + 30 = 42. Answer: 42", "the answer is the answer of the answer", "naïve café 🙂"]
TRAINED = train_tokenizer(CORPUS, 320)
LIMITS = Limits(max_tokens=10_000, max_prompt_tokens=5_000, long_prompts="drop")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), min_size=1, max_size=4)


@settings(deadline=None)  # machines under load
@given(turns=TURNS, answer=TEXT)
def test_token_ids_decode_to_the_rendered_dialogue(turns, answer):
    prompt = tuple(Message(role, content) for role, content in turns)
    (encoded,) = Encoder(TRAINED, chat=True, limits=LIMITS).encode([(prompt, answer)])
    whole = "".join(f"<|{role}|>{content}" + "<|end|>" * (role == "assistant") for role, content in turns)
    ids = np.concatenate([encoded.prompt_ids, encoded.response_ids])
    assert TRAINED.decode(ids) == f"{whole}<|assistant|>{answer}<|end|>"
    assert encoded.response_ids[-1] == TRAINED.eos_token_id


def test_digits_stay_apart_and_words_do_not():
    assert TRAINED.tokenize("12 answer") == ["1", "2", "Ġanswer"]


def test_special_tokens_come_first_and_the_vocabulary_keeps_to_its_size():
    assert TRAINED.convert_ids_to_tokens(range(5)) == [
        "<|pad|>",
        "<|end|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
    ]
    assert len(train_tokenizer(CORPUS * 2, 262)) == 262
    assert len(train_tokenizer(["x"], 5000)) == 261  # nothing to merge: special tokens and bytes


def test_a_saved_tokenizer_loads_by_its_folder_and_names_no_place(tmp_path):
    for name in ("first", "second"):
        train_tokenizer(CORPUS, 320).save_pretrained(tmp_path / name)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    loaded = load_tokenizer(ModelParams(name=str(tmp_path / "first")))
    assert (loaded.eos_token, loaded.pad_token, len(loaded)) == ("<|end|>", "<|pad|>", len(TRAINED))
    assert loaded("12 answer").input_ids == TRAINED("12 answer").input_ids
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "first").iterdir())


def test_a_local_models_tokenizer_is_the_same_wherever_it_lies(tmp_path):
    for name in ("here", "there"):
        chat_tokenizers.llama3().save_pretrained(tmp_path / name)
        load_tokenizer(ModelParams(name=str(tmp_path / name))).save_pretrained(tmp_path / "out" / name)
    assert digests(tmp_path / "out" / "here") == digests(tmp_path / "out" / "there")


def test_a_folder_without_a_tokenizer_is_a_wrong_request(tmp_path):
    with pytest.raises(RequestError, match="must hold a transformers tokenizer"):
        load_tokenizer(ModelParams(name=str(tmp_path)))


def test_a_name_that_cannot_be_reached_is_a_wrong_request_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match=r"the tokenizer of 'no/such-model' can't be opened.*model\.name.*hub"):
        load_tokenizer(ModelParams(name="no/such-model"))


def test_a_template_file_is_read_and_a_missing_one_is_a_wrong_request(tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    assert read_template(str(tmp_path / "chat.jinja")) == "{{ messages }}"
    assert read_template("auto") is read_template("never") is None
    with pytest.raises(RequestError, match=r"prepare\.chat_template: .*no readable file"):
        read_template(str(tmp_path / "absent.jinja"))
