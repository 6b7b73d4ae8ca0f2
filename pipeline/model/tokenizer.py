"""The tokenizer: a model's own, used as it is, or a byte-level BPE trained on the sft rows for a from-scratch model."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError
from pipeline.model.opening import refuse_adapter, translated
from pipeline.params import ModelParams

PAD, END = "<|pad|>", "<|end|>"
TURNS = ("<|system|>", "<|user|>", "<|assistant|>")

# One token opens a turn; only the assistant's turn is closed, by the end-of-turn token that generation stops at.
SCRATCH_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role ' + message['role']) -}}{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Any:
    """A byte-level BPE with padding, end and turn tokens and a chat template, as a PreTrainedTokenizerFast.

    The same texts in the same order give the same tokenizer. The vocabulary is smaller than `vocabulary_size` where the
    texts hold too few repeated pieces; models take len(tokenizer).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # A token per digit: a small model learns arithmetic and number formats far sooner than with merged digits.
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, END, *TURNS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=list(TURNS),
        chat_template=SCRATCH_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def open_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a local folder, exactly as it was saved; RequestError where there is none.

    Beside a config.json of some architectures (Qwen2), AutoTokenizer replaces a generic tokenizer by the architecture's
    own class, which adds a token that the model has no embedding for.
    """
    with translated(folder, remedy="It must hold a transformers tokenizer: tokenizer.json, or an older form's files."):
        config = folder / "tokenizer_config.json"
        named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") if config.exists() else None
        if named in ("TokenizersBackend", "PreTrainedTokenizerFast") and (folder / "tokenizer.json").exists():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder)
        from transformers import AutoTokenizer  # imports torch: seconds, and 300 MB

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def open_prepared_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that `prepare` wrote to `folder`; RequestError where it did not."""
    if not folder.is_dir():
        raise RequestError(f"{folder} does not exist; it is written by `refcache prepare` (run `dvc repro prepare`).")
    return open_tokenizer(folder, trust_remote_code=trust_remote_code)


def load_tokenizer(model: ModelParams) -> Any:
    """The tokenizer that goes with the reference: of `model.adapter` where that brings one, else of `model.name`.

    An adapter was trained with the tokens and the chat template in its own folder. Raises RequestError where there is
    neither a usable local folder nor a hub in reach.
    """
    assert model.name is not None  # the caller trains one otherwise
    refuse_adapter(model.name)
    source, revision = model.name, model.revision
    if model.adapter is not None and _brings_tokenizer(model.adapter):
        print(f"tokenizer and chat template: those of model.adapter, {model.adapter}", file=sys.stderr)
        source, revision = model.adapter, None
    if Path(source).is_dir():
        return open_tokenizer(Path(source), trust_remote_code=model.trust_remote_code)
    from transformers import AutoTokenizer

    with translated(source, what=f"the tokenizer of {source!r}"):
        return AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=model.trust_remote_code
        )


def _brings_tokenizer(adapter: str) -> bool:
    from transformers.utils import cached_file

    if Path(adapter).is_dir():
        return (Path(adapter) / "tokenizer_config.json").exists()
    with translated(adapter, what=f"model.adapter {adapter!r}"):
        # None where the hub has no such file; an error where it can't be asked.
        return cached_file(adapter, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is not None


def read_template(choice: str) -> str | None:
    """The jinja text that prepare.chat_template names, or None for "auto" and "never". Raises RequestError."""
    if choice in ("auto", "never"):
        return None
    try:
        return Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"prepare.chat_template: {choice!r} is no readable file ({error}); give auto, never, or the path of a "
            "jinja file."
        ) from None
