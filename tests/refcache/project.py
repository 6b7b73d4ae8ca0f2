"""A project of the demo's data in a folder: prepared, with a small random reference and a policy."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline.data.prepare import prepare_data
from pipeline.params import DemoParams, ModelParams, PrepareParams, ScratchModel
from tests.tiny import write_model, write_reference_cache

PREPARE = PrepareParams(source="demo", demo=DemoParams(prompts=24, sft_rows=24))


def write_project(folder: Path) -> None:
    prepared = folder / "data/prepared"
    prepare_data(
        PREPARE,
        ModelParams(scratch=ScratchModel(vocabulary_size=300)),
        sft=prepared / "sft.parquet",
        tokenizer=prepared / "tokenizer",
        pairs=prepared / "pairs",
        summary=prepared / "summary.json",
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(prepared / "tokenizer")
    for name, seed in (("models/reference", 0), ("models/policies/dpo-0", 1)):
        write_model(folder / name, seed=seed, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        tokenizer.save_pretrained(folder / name)
    write_reference_cache(folder / "data/reference/logps", prepared / "pairs", folder / "models/reference")


def plain_logps(model: Path, text: str, response: str) -> list[float]:
    """Token log-probs of `response` and the end token behind the rendered `text`: straight from transformers."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    before, after = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, response + tokenizer.eos_token)
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        logps = loaded(torch.tensor([before + after])).logits[0].log_softmax(-1)
    return [logps[len(before) + i - 1, token].item() for i, token in enumerate(after)]
