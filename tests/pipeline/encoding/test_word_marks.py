"""Token ids are those of the text in one piece, also where a tokenizer marks the beginning of a text.

SentencePiece tokenizers encode "4" alone and "4" after "[/INST] " differently. The independent answer is what a model
is trained with and generates: transformers' encoding of the whole dialogue behind that of the prompt, as TRL does it.
"""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline.encoding.dialogues import Message
from pipeline.encoding.encoder import Encoded, Encoder, Limits
from tests.pipeline.data.chat_tokenizers import CHATML, GEMMA, LLAMA3
from tests.tiny import TINY_MODEL

LIMITS = Limits(max_tokens=1000, max_prompt_tokens=500, long_prompts="drop")
ENDS = ["</s>", "<|eot_id|>", "<end_of_turn>", "<|im_end|>", "<|end|>", "<|END|>"]
OPENINGS = ["<s>", "<bos>", "<start_of_turn>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
OPENINGS += ["<|im_start|>", "<|user|>", "<|assistant|>", "<|START|>"]
SPECIAL = ["<unk>", *OPENINGS, *ENDS]


def turns(user: str, assistant: str, ask: str, opening: str = "") -> str:
    """A template from what a user's and an assistant's turn look like; {} is the content, ask the generation prompt."""
    parts = [f"{{{{ {part} }}}}" for part in (_jinja(user), _jinja(assistant))]
    body = "{% if m['role'] == 'user' %}" + parts[0] + "{% else %}" + parts[1] + "{% endif %}"
    asked = "{% if add_generation_prompt %}{{ " + repr(ask) + " }}{% endif %}"
    return "{{ " + repr(opening) + " }}{% for m in messages %}" + body + "{% endfor %}" + asked


def _jinja(turn: str) -> str:
    before, after = turn.split("{}")
    return f"{before!r} + m['content'] + {after!r}"


TEMPLATES = {
    "chatml": CHATML,
    "llama 3": LLAMA3.replace("{{ bos_token }}", "{{ '<|begin_of_text|>' }}"),
    "gemma": GEMMA.replace("{{ bos_token }}", "{{ '<bos>' }}"),
    "llama 2": turns("[INST] {} [/INST]", " {} </s>", "", "<s>"),
    "mistral 0.1": turns("[INST] {} [/INST]", "{}</s>", "", "<s>"),
    "mistral 0.3": turns("[INST] {}[/INST]", " {}</s>", "", "<s>"),
    "zephyr": turns("<|user|>\n{}</s>\n", "<|assistant|>\n{}</s>\n", "<|assistant|>\n"),
    "tinyllama": turns("<|user|>\n{}</s>\n", "<|assistant|>\n{}</s>", "<|assistant|>"),
    "phi 3": turns("<|user|>\n{}<|end|>\n", "<|assistant|>\n{}<|end|>\n", "<|assistant|>\n"),
    "vicuna": turns("USER: {} ", "ASSISTANT: {}</s>", "ASSISTANT:", "<s>A chat. "),
    "alpaca": turns("### Instruction:\n{}\n\n", "### Response:\n{}</s>\n\n", "### Response:\n"),
    "deepseek": turns("User: {}\n\n", "Assistant: {}</s>", "Assistant:", "<s>"),
    "command": turns("<|START|>U: {}<|END|>", "<|START|>A:{}<|END|>", "<|START|>A:", "<s>"),
}
TEXTS = ["What is 2 + 2?", "It is 4.", "Four, I think", "4", " 4", "\nIt is", "no", "naïve 漢字", "It is 4.  "]


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """As Llama 2's fast tokenizer (a mark at the beginning of every segment), or Mistral's later one (of the text)."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    alphabet = sorted({c for text in TEXTS for c in text.replace(" ", "▁")} | set("abcdefghijklmnopqrstuvwxyz\n"))
    if kind == "segments":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 9 + ["It is what it is, I think."] * 9, trainer)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def whole_and_prompt(tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    said = [*messages, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(said, return_dict=True)["input_ids"], prompt


@pytest.mark.parametrize("kind", ["segments", "first"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_and_response_are_the_whole_dialogues_own_ids(template, kind):
    tokenizer = sentencepiece(kind)
    tokenizer.chat_template = TEMPLATES[template]
    answers = TEXTS[1:]
    prompt = (Message("user", TEXTS[0]),)
    found = Encoder(tokenizer, chat=True, limits=LIMITS).encode([(prompt, answer) for answer in answers])
    ends = tokenizer.convert_tokens_to_ids(ENDS)
    for answer, encoded in zip(answers, found, strict=True):
        whole, own = whole_and_prompt(tokenizer, TEXTS[0], answer)
        last = max(i for i, token in enumerate(whole) if token in ends)  # a line break behind it is cut
        joined = [*encoded.prompt_ids.tolist(), *encoded.response_ids.tolist()]
        if whole[: len(own)] == own:
            assert encoded.prompt_ids.tolist() == own
            assert joined == whole[: last + 1]
        else:  # the template's boundary lies within a token: the text is the same, and the prompt's ids are its own
            assert encoded.prompt_ids.tolist() == own
            assert tokenizer.decode(joined).replace(" ", "") == tokenizer.decode(whole[: last + 1]).replace(" ", "")


def test_a_plain_response_goes_on_where_its_prompt_ends():
    """As the model would have generated it: without a word mark of its own, and with the prompt's ids unchanged."""
    tokenizer = sentencepiece("first")
    own = tokenizer("It is", add_special_tokens=False)["input_ids"]
    for response, text in ((" 4.", "It is 4."), ("n", "It isn")):
        (encoded,) = Encoder(tokenizer, chat=False, limits=LIMITS).encode([("It is", response)])
        assert encoded.prompt_ids.tolist() == own
        assert tokenizer.decode([*own, *encoded.response_ids.tolist()[:-1]]) == text


def test_a_response_is_closed_once_where_the_tokenizer_adds_eos_itself():
    tokenizer = sentencepiece("first")
    ids = tokenizer.convert_tokens_to_ids
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", ids("<s>")), ("</s>", ids("</s>"))]
    )
    for response in (" four", " four</s>"):
        (encoded,) = Encoder(tokenizer, chat=False, limits=LIMITS).encode([("It is", response)])
        assert encoded.prompt_ids[0] == ids("<s>") and ids("</s>") not in encoded.prompt_ids
        assert encoded.response_ids.tolist().count(ids("</s>")) == 1 and encoded.response_ids[-1] == ids("</s>")


def test_byte_level_tokenizers_keep_the_ids_of_both_parts_alone():
    """Their keys are in people's caches, and without a mark both ways agree."""
    from tests.pipeline.data import chat_tokenizers

    tokenizer = chat_tokenizers.chatml()
    prompt = (Message("user", TEXTS[0]),)
    for answer in TEXTS[1:]:
        (encoded,) = Encoder(tokenizer, chat=True, limits=LIMITS).encode([(prompt, answer)])
        assert isinstance(encoded, Encoded)
        whole, _ = whole_and_prompt(tokenizer, TEXTS[0], answer)
        assert [*encoded.prompt_ids.tolist(), *encoded.response_ids.tolist()] == whole[:-1]  # the line break after it
        assert encoded.response_ids.tolist()[:-1] == tokenizer(answer, add_special_tokens=False)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["segments", "first"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_those_that_trls_dpo_trains_on(template, kind, tmp_path):
    """But for a line break behind the end token, and prompts that TRL cuts where a token lies across their end."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = sentencepiece(kind)
    tokenizer.pad_token, tokenizer.chat_template = "</s>", TEMPLATES[template]
    answers = [text for text in TEXTS[1:] if _keeps_its_prompt(tokenizer, text)]
    assert len(answers) > 2
    rows = [_row(answers[0], other) for other in answers[1:]]
    shape = AutoConfig.for_model("qwen2", **TINY_MODEL, vocab_size=len(tokenizer))
    model, reference = (AutoModelForCausalLM.from_config(shape) for _ in range(2))
    config = trl.DPOConfig(str(tmp_path), max_length=None, report_to=[], use_cpu=True, bf16=False)
    data = datasets.Dataset.from_list(rows)
    trainer = trl.DPOTrainer(model, reference, args=config, train_dataset=data, processing_class=tokenizer)
    prompt = (Message("user", TEXTS[0]),)
    ours = Encoder(tokenizer, chat=True, limits=LIMITS).encode([(prompt, answer) for answer in answers])
    ends = tokenizer.convert_tokens_to_ids(ENDS)
    for row, other in zip(trainer.train_dataset, ours[1:], strict=True):
        assert row["prompt_ids"] == other.prompt_ids.tolist()
        for name, encoded in (("chosen_ids", ours[0]), ("rejected_ids", other)):
            last = max(i for i, token in enumerate(row[name]) if token in ends)
            assert row[name][: last + 1] == encoded.response_ids.tolist()


def _row(chosen: str, rejected: str) -> dict:
    said = {"chosen": chosen, "rejected": rejected}
    row = {name: [{"role": "assistant", "content": text}] for name, text in said.items()}
    return {"prompt": [{"role": "user", "content": TEXTS[0]}]} | row


def _keeps_its_prompt(tokenizer, answer: str) -> bool:
    whole, own = whole_and_prompt(tokenizer, TEXTS[0], answer)
    return whole[: len(own)] == own
