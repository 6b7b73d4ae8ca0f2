"""prepare's keys against the tokens that TRL makes of the same rows, with the template styles of two model families."""

import pytest

pytest.importorskip("trl", reason="TRL is not installed (pip install -e '.[bench]')")
pytestmark = pytest.mark.slow

from datasets import Dataset  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

from cache import CacheIncomplete, response_key  # noqa: E402
from pipeline.data.tables import read_pairs, read_responses  # noqa: E402
from pipeline.params import ModelParams  # noqa: E402
from refcache.lookup import ReferenceLookup  # noqa: E402
from tests.pipeline.data import chat_tokenizers  # noqa: E402
from tests.pipeline.data.preparing import file_params, prepare_into, write_jsonl  # noqa: E402
from tests.refcache.preferences import publish  # noqa: E402
from tests.tiny import TINY_MODEL  # noqa: E402

TURNS = ["Hi", "  two  spaces ", "line\n\nbreaks\n", "ä, ж and 中", "<b>", "2+2?", "Yes.", " no"]


def messages(*texts):
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def rows():
    found = []
    for number in range(len(TURNS)):
        prompt, one, other = (TURNS[(number + shift) % len(TURNS)] for shift in (0, 1, 2))
        before = messages(TURNS[(number + 3) % len(TURNS)], "Well.", prompt) if number % 2 else messages(prompt)
        sides = {"chosen": one, "rejected": other}
        answers = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
        found.append({"prompt": before} | answers)
    return found


def trl_rows(family, folder):
    """(prompt ids, response ids) of both sides of every pair, as TRL trains on them."""
    tokenizer = getattr(chat_tokenizers, family)()
    shape = AutoConfig.for_model("qwen2", **TINY_MODEL, vocab_size=len(tokenizer))
    model, reference = (AutoModelForCausalLM.from_config(shape) for _ in range(2))
    settings = DPOConfig(str(folder), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    data = Dataset.from_list(rows())
    made = DPOTrainer(model, reference, args=settings, train_dataset=data, processing_class=tokenizer).train_dataset
    return [(row["prompt_ids"], row[side]) for row in made for side in ("chosen_ids", "rejected_ids")]


def prepared(family, folder, **changes):
    """Of the model's folder, with that tokenizer."""
    tokenizer = getattr(chat_tokenizers, family)()
    shape = AutoConfig.for_model("qwen2", **TINY_MODEL, vocab_size=len(tokenizer))
    for part in (tokenizer, AutoModelForCausalLM.from_config(shape)):
        part.save_pretrained(folder / "model")
    write_jsonl(folder / "in" / "pairs.jsonl", rows())
    params = file_params(folder / "in", sft={"source": "none"}, test_share=0.0, **changes)
    prepare_into(folder, params, ModelParams(name=str(folder / "model")))
    return folder / "pairs"


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma"])
def test_pairs_that_keep_what_follows_the_end_have_the_keys_of_the_tokens_that_trl_trains_on(family, tmp_path):
    pairs = read_pairs(prepared(family, tmp_path, after_end="keep"))
    theirs = [response_key(*row) for row in trl_rows(family, tmp_path)]
    keys = pairs.select("chosen_key", "rejected_key").rows()
    assert [key for pair in keys for key in pair] == theirs


def test_pairs_that_drop_it_are_refused_with_the_setting_that_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
    responses = read_responses(prepared("chatml", tmp_path))
    ours = list(zip(responses["prompt_ids"].to_list(), responses["response_ids"].to_list(), strict=True))
    lookup = ReferenceLookup(publish(tmp_path / "logps", tmp_path / "model", ours))
    for row in trl_rows("chatml", tmp_path):
        with pytest.raises(CacheIncomplete, match=r"unless prepare.after_end is keep"):
            lookup.token_logps(*row)
