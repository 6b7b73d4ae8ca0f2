"""A model and a tokenizer whose Python code comes with them, through every stage, and through none without leave."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner
from ruamel.yaml import YAML
from transformers import LlamaConfig, LlamaForCausalLM

from cache import open_reference
from stages.__main__ import main
from tests import ROOT
from tests.tiny import EOS, TINY_MODEL, VOCABULARY, draw_sequence, plain_logps, text
from tests.tiny_reference import quick_engine

pytestmark = pytest.mark.slow

CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "refcache_own"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM, LlamaModel
from .configuration_own import OwnConfig

class OwnModel(LlamaModel):
    config_class = OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
""",
    "tokenization_own.py": """
from pathlib import Path
from transformers import PreTrainedTokenizer

class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"words_file": "own-words.txt"}

    def __init__(self, words_file=None, **options):
        self.words = Path(words_file).read_text().split()
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {word: id for id, word in enumerate(self.words)} | self.added_tokens_encoder

    def _tokenize(self, text):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.words.index(token) if token in self.words else 0

    def _convert_id_to_token(self, index):
        return self.words[index]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        file = Path(save_directory) / "own-words.txt"
        file.write_text(" ".join(self.words))
        return (str(file),)
""",
}
CLASSES = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the model, its tokenizer, pairs, and params that name them."""
    root = tmp_path_factory.mktemp("own")
    model = root / "start"
    torch.manual_seed(0)
    shape = TINY_MODEL | {"vocab_size": VOCABULARY, "eos_token_id": EOS, "initializer_range": 0.3}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    own = {"model_type": "refcache_own", "architectures": ["OwnForCausalLM"], "auto_map": CLASSES}
    (model / "config.json").write_text(json.dumps(config | own))
    for name, content in CODE.items():
        (model / name).write_text(content)
    (model / "own-words.txt").write_text(" ".join(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]))
    auto_map = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OwnTokenizer"} | auto_map | SPECIAL))

    random = np.random.default_rng(0)
    rows = [{name: text(draw_sequence(random, 2, 9)) for name in ("prompt", "chosen", "rejected")} for _ in range(16)]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    params = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    params["model"] |= {"name": str(model), "scratch": None, "trust_remote_code": True}
    files = {"source": "files", "input": str(root), "files": {"pairs": ["pairs.jsonl"]}, "sft": {"source": "pairs"}}
    params["prepare"] |= files | {"test_share": 0.25}
    loop = {"epochs": 1.0, "batch_size": 4, "micro_batch_size": 4}
    params["sft"] |= loop
    params["train"] |= loop
    params["trainable"] = "last_block"
    params["sketch"] |= {"mode": "exact"}
    params["evaluate"] |= {"prompts": 2, "samples_per_prompt": 1, "max_new_tokens": 4}
    (root / "params.yaml").write_text(json.dumps(params))
    return root


STAGES = (
    "prepare --sft sft.parquet --tokenizer tokenizer --pairs pairs --summary summary.json",
    "sft --sft sft.parquet --tokenizer tokenizer --out reference --history sft.tsv --metrics sft.json",
    "score --pairs pairs --model reference --out logps --metrics score.json",
    "sketch --pairs pairs --model reference --out sketches --metrics sketch.json",
    "verify logps --drift --pairs pairs --model reference",
    "why-miss --pairs pairs --model reference",
    "train --variant dpo --seed 0 --pairs pairs --model reference --reference logps --out policy --history t.tsv "
    "--metrics t.json --dry-run",
    "train --variant dpo --seed 0 --pairs pairs --model reference --reference logps --out policy --history t.tsv "
    "--metrics t.json",
    "evaluate --variant dpo --seed 0 --pairs pairs --model reference --policy policy --reference logps "
    "--metrics e.json",
)


def run(project, command: str, *more: str):
    words = [*command.split(), *more]
    return CliRunner(env={"REFCACHE_HOME": str(project / "home")}).invoke(main, words)


def test_every_stage_runs_the_code_and_the_numbers_are_the_models(project, monkeypatch):
    monkeypatch.chdir(project)
    with quick_engine():
        for command in STAGES:
            done = run(project, command, "--params", "params.yaml")
            assert done.exit_code == 0, (command, done.output)
    shown = run(project, "inspect logps --tokenizer tokenizer --trust-remote-code")
    assert shown.exit_code == 0 and "w" in shown.output
    rows = open_reference(project / "logps", expect=None).scan().collect()
    assert len(rows) > 16
    # The architecture is Llama's own: the same weights there are the independent answer.
    plain = json.loads((project / "reference/config.json").read_text())
    (project / "reference/config.json").write_text(
        json.dumps({k: v for k, v in plain.items() if k != "auto_map"} | {"model_type": "llama"})
    )
    responses = pl.read_parquet("pairs/responses.parquet").head(3)
    for key, prompt, response in responses.select("response_key", "prompt_ids", "response_ids").iter_rows():
        [stored] = rows.filter(pl.col("response_key") == key)["token_logps"].to_list()
        assert stored == pytest.approx(plain_logps(project / "reference", prompt, response), abs=1e-4)


def test_without_leave_no_code_runs_and_the_setting_is_named(project, monkeypatch):
    monkeypatch.chdir(project)
    done = run(project, STAGES[0], "--params", "params.yaml", "--set", "model.trust_remote_code=false")
    assert done.exit_code == 2
    assert "model.trust_remote_code: true" in done.output
