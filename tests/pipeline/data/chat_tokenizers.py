"""Hand-made byte-level tokenizers with the template styles of well-known model families."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
COLONS = (  # ends a turn with a line break and nothing else
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_tokenizer(special: list[str], *, eos: str | None, bos: str | None = None, template: str | None = None) -> Any:
    """One token per byte, and `special` as special tokens of which only eos and bos are declared by name."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, chat_template=template)


def chatml() -> Any:
    return byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|endoftext|>", template=CHATML)


def llama3() -> Any:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_tokenizer(special, eos="<|end_of_text|>", bos="<|begin_of_text|>", template=LLAMA3)


def gemma() -> Any:
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    return byte_tokenizer(special, eos="<eos>", bos="<bos>", template=GEMMA)


def colons() -> Any:
    return byte_tokenizer(["</s>"], eos="</s>", template=COLONS)


def plain() -> Any:
    return byte_tokenizer(["</s>"], eos="</s>")


def plain_that_frames_prompts() -> Any:
    """Adds <s> and </s> around every text by itself, as T5 and some Llama-2 descendants do."""
    tokenizer = byte_tokenizer(["<s>", "</s>"], eos="</s>", bos="<s>")
    ids = tokenizer.convert_tokens_to_ids
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", ids("<s>")), ("</s>", ids("</s>"))]
    )
    return tokenizer
