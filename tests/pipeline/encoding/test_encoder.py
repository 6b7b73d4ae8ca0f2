"""Rendering, the end-of-turn rule and truncation, with the template styles of several model families."""

import pytest

from pipeline.encoding.dialogues import Message
from pipeline.encoding.encoder import Encoded, Encoder, Limits, Unusable
from pipeline.errors import RequestError
from tests.pipeline.data import chat_tokenizers
from tests.pipeline.data.chat_tokenizers import byte_tokenizer

WIDE = Limits(max_tokens=1000, max_prompt_tokens=500, long_prompts="drop")
ASK = (Message("user", "2+2?"),)
DIALOGUE = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "2+2?"))


def encode_one(tokenizer, prompt, response, *, chat=True, limits=WIDE):
    (result,) = Encoder(tokenizer, chat=chat, limits=limits).encode([(prompt, response)])
    return result


def texts(tokenizer, encoded):
    return tokenizer.decode(encoded.prompt_ids), tokenizer.decode(encoded.response_ids)


@pytest.mark.parametrize(
    ("family", "prompt", "expected_prompt", "expected_response"),
    [
        ("chatml", ASK, "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", "4<|im_end|>"),
        (
            "chatml",
            DIALOGUE,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
            "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
            "4<|im_end|>",
        ),
        (
            "llama3",
            ASK,
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "4<|eot_id|>",
        ),
        ("gemma", ASK, "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n", "4<end_of_turn>"),
        ("colons", ASK, "user: 2+2?\nassistant: ", "4\n</s>"),
    ],
)
def test_a_response_ends_with_the_templates_end_of_turn_or_else_with_eos(
    family, prompt, expected_prompt, expected_response
):
    tokenizer = getattr(chat_tokenizers, family)()
    assert texts(tokenizer, encode_one(tokenizer, prompt, "4")) == (expected_prompt, expected_response)


def test_there_is_one_beginning_of_text_although_the_tokenizer_adds_one_by_itself():
    from tokenizers import processors

    tokenizer = chat_tokenizers.gemma()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    encoded = encode_one(tokenizer, ASK, "4")
    assert [*encoded.prompt_ids, *encoded.response_ids].count(tokenizer.bos_token_id) == 1


def test_white_space_of_the_answer_itself_is_kept():
    tokenizer = chat_tokenizers.chatml()
    assert texts(tokenizer, encode_one(tokenizer, ASK, "4 \n\n"))[1] == "4 \n\n<|im_end|>"


def test_a_special_token_inside_the_answer_does_not_end_it():
    tokenizer = chat_tokenizers.chatml()
    answer = "it is written <|im_end|> and that is all"
    assert texts(tokenizer, encode_one(tokenizer, ASK, answer))[1] == answer + "<|im_end|>"
    plain = chat_tokenizers.plain()
    assert texts(plain, encode_one(plain, "q", "a</s> b", chat=False))[1] == "a</s> b</s>"


def test_an_unknown_token_at_the_end_ends_nothing():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "four": 2, "q": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]")
    assert encode_one(tokenizer, "q", "four ☃", chat=False).response_ids.tolist() == [2, 0, 1]


def test_without_a_template_the_prompt_keeps_what_the_tokenizer_adds_except_the_end():
    tokenizer = chat_tokenizers.plain_that_frames_prompts()
    assert texts(tokenizer, encode_one(tokenizer, "2+2?", "4", chat=False)) == ("<s>2+2?", "4</s>")


def test_without_a_template_text_is_taken_as_it_is_and_eos_is_added_once():
    tokenizer = chat_tokenizers.plain()
    assert texts(tokenizer, encode_one(tokenizer, "2+2?", " 4 ", chat=False)) == ("2+2?", " 4 </s>")
    assert texts(tokenizer, encode_one(tokenizer, "2+2?", "4</s>", chat=False)) == ("2+2?", "4</s>")


def test_a_prompt_that_ends_in_the_text_of_eos_keeps_it_where_the_tokenizer_adds_none():
    tokenizer = chat_tokenizers.plain()
    assert texts(tokenizer, encode_one(tokenizer, "Say </s>", "4", chat=False))[0] == "Say </s>"


def test_no_way_to_end_a_response_is_a_wrong_request():
    with pytest.raises(RequestError, match=r"no end-of-sequence token.*prepare\.chat_template"):
        encode_one(byte_tokenizer([], eos=None), "2+2?", "4", chat=False)


def test_a_dialogue_that_does_not_begin_with_its_prompt_is_unusable_and_the_others_are_not():
    """As where a template moves something out of earlier turns once another turn follows."""
    turns = "{% if '#' in messages[-1]['content'] %}!{% endif %}" + chat_tokenizers.COLONS
    tokenizer = byte_tokenizer(["</s>"], eos="</s>", template=turns)
    moved, good = Encoder(tokenizer, chat=True, limits=WIDE).encode([(ASK, "4 #"), (ASK, "4")])
    assert isinstance(moved, Unusable) and not moved.prompt_too_long
    assert "goes on with 'user: 2+2?" in moved.reason and "prepare.chat_template" in moved.reason
    assert isinstance(good, Encoded)


def test_broken_jinja_is_a_wrong_request():
    with pytest.raises(RequestError, match=r"prepare\.chat_template: the template is not valid jinja"):
        encode_one(byte_tokenizer(["</s>"], eos="</s>", template="{% for m in %}"), ASK, "4")


def test_a_dialogue_that_the_template_refuses_is_unusable_and_says_why():
    tokenizer = chat_tokenizers.gemma()
    system = (Message("system", "Be brief."), *ASK)
    refused, good = Encoder(tokenizer, chat=True, limits=WIDE).encode([(system, "4"), (ASK, "4")])
    assert refused == Unusable("the chat template refuses the dialogue: System role not supported")
    assert isinstance(good, Encoded)


def test_a_template_that_prints_the_date_gives_the_same_tokens_on_every_day():
    template = "{{ strftime_now('%d %b %Y') }}" + chat_tokenizers.COLONS
    tokenizer = byte_tokenizer(["</s>"], eos="</s>", template=template)
    assert texts(tokenizer, encode_one(tokenizer, ASK, "4"))[0].startswith("26 Jul 2024user: ")


def test_responses_keep_their_start_and_say_that_they_were_cut():
    tokenizer = chat_tokenizers.plain()
    limits = Limits(max_tokens=10, max_prompt_tokens=5, long_prompts="drop")
    fits, cut = Encoder(tokenizer, chat=False, limits=limits).encode([("2+2?", "12345"), ("2+2?", "123456")])
    assert (texts(tokenizer, fits)[1], fits.truncated) == ("12345</s>", False)
    assert (texts(tokenizer, cut)[1], cut.truncated) == ("123456", True)  # it lost its end and shows so


def test_long_prompts_are_dropped_or_lose_their_left_side():
    tokenizer = chat_tokenizers.plain()
    drop = Limits(max_tokens=20, max_prompt_tokens=4, long_prompts="drop")
    dropped, kept = Encoder(tokenizer, chat=False, limits=drop).encode([("12+2?", "4"), ("2+2?", "4")])
    assert dropped == Unusable("the prompt has 5 tokens, more than 4", prompt_too_long=True)
    assert not kept.prompt_truncated
    cut = encode_one(tokenizer, "12+2?", "4", chat=False, limits=drop._replace(long_prompts="truncate_left"))
    assert texts(tokenizer, cut) == ("2+2?", "4</s>") and cut.prompt_truncated


def test_results_come_in_the_order_asked_for_across_batches_and_repeats(monkeypatch):
    monkeypatch.setattr("pipeline.encoding.encoder.BATCH_TEXTS", 3)
    tokenizer = chat_tokenizers.plain()
    examples = [(f"q{n % 4}", f"a{n % 5}") for n in range(20)]
    encoded = Encoder(tokenizer, chat=False, limits=WIDE).encode(examples)
    assert [texts(tokenizer, e) for e in encoded] == [(q, a + "</s>") for q, a in examples]


def test_nothing_to_encode_is_nothing():
    assert Encoder(chat_tokenizers.plain(), chat=False, limits=WIDE).encode([]) == []


@pytest.mark.parametrize("asked", ["<think>\n", "<think>\n\n</think>\n\n", "<think></think>"])
@pytest.mark.parametrize("said", ["", "<think>\n\n</think>\n\n"])
def test_a_block_of_thoughts_that_is_only_asked_for_belongs_to_no_prompt(asked, said):
    """The response is what the template renders for the assistant's turn, behind the same prompt for all."""
    turns = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}" + said + "{% endif %}"
    )
    turns += "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<|im_start|>assistant\n" + asked + "{% endif %}"
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>", "</s>"], eos="</s>", template=template)
    answers = ["4", "<think>\nTwo and two.\n</think>\n\n4"]
    found = Encoder(tokenizer, chat=True, limits=WIDE).encode([(ASK, answer) for answer in answers])
    assert [texts(tokenizer, encoded) for encoded in found] == [
        ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", f"{said}{answer}<|im_end|>") for answer in answers
    ]


# The assistant's turn inside {% generation %}, as TRL's training templates mark what is trained on; the last one opens
# with a block of thoughts, empty where there are none.
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}[a]{% generation %}"
    "{% if loop.last %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}[u]{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% if not think %}<think></think>{% endif %}{% endif %}"
)


@pytest.mark.parametrize("thoughts", ["", "four"])
@pytest.mark.parametrize("prompt", [ASK, DIALOGUE])
def test_the_response_is_what_transformers_masks_as_the_assistants(prompt, thoughts):
    """Where a template says itself which tokens the assistant's are, the rule about blocks of thoughts agrees."""
    tokenizer = byte_tokenizer(["</s>"], eos="</s>", template=MARKED)
    answer = Message("assistant", "4", '{"reasoning_content": "four"}') if thoughts else "4"
    found = encode_one(tokenizer, prompt, answer)
    messages = [message.for_template() for message in prompt]
    marked = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "4", "reasoning_content": thoughts}],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    ids, mask = marked["input_ids"], marked["assistant_masks"]
    first = len(mask) - mask[::-1].index(0)  # of the last marked run
    assert found.response_ids.tolist() == ids[first:]
    assert found.prompt_ids.tolist() == ids[:first]


@pytest.mark.parametrize(
    ("family", "response", "dropped", "kept"),
    [
        ("chatml", "4", "4<|im_end|>", "4<|im_end|>\n"),
        ("chatml", "4<|im_end|>\n<|im_end|>", "4<|im_end|>", "4<|im_end|>\n"),
        ("llama3", "4", "4<|eot_id|>", "4<|eot_id|>"),
        ("gemma", "4", "4<end_of_turn>", "4<end_of_turn>\n"),
        ("colons", "4", "4\n</s>", "4\n</s>"),
    ],
)
def test_what_the_template_writes_behind_the_end_is_kept_on_request(family, response, dropped, kept):
    tokenizer = getattr(chat_tokenizers, family)()
    for after_end, expected in (("drop", dropped), ("keep", kept)):
        encoder = Encoder(tokenizer, chat=True, limits=WIDE, after_end=after_end)
        (encoded,) = encoder.encode([(ASK, response)])
        assert texts(tokenizer, encoded)[1] == expected


def test_what_is_behind_the_end_is_cut_first():
    (whole,) = Encoder(chat_tokenizers.chatml(), chat=True, limits=WIDE, after_end="keep").encode([(ASK, "4")])
    room = len(whole.prompt_ids) + 2
    limits = Limits(max_tokens=room, max_prompt_tokens=room - 1, long_prompts="drop")
    (cut,) = Encoder(chat_tokenizers.chatml(), chat=True, limits=limits, after_end="keep").encode([(ASK, "4")])
    assert cut.response_ids.tolist() == whole.response_ids.tolist()[:2] and cut.truncated


def test_plain_texts_end_the_same_either_way():
    tokenizer = chat_tokenizers.plain()
    found = [
        Encoder(tokenizer, chat=False, limits=WIDE, after_end=a).encode([("2+2?", "4</s>\n")]) for a in ("drop", "keep")
    ]
    assert found[0][0].response_ids.tolist() == found[1][0].response_ids.tolist()
