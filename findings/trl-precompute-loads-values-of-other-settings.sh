#!/usr/bin/env bash
# TRL's DPOTrainer loads reference log-probs that it precomputed under another ld_alpha, or another max_length.
#
# trl 1.16.0, transformers 5.19.0, datasets 5.2.0, torch 2.13.0, on CPU.
# Expected: with precompute_ref_log_probs=True and another ld_alpha, the reference is asked again, as its log-probs are
# weighted sums of the tokens' by ld_alpha.
# Seen: the values are stored beside a data set that lies in files, under a hash of the prepared data and the reference's
# weights. Where max_length is null neither depends on ld_alpha; with truncation_mode "keep_end" neither depends on
# max_length (which truncates in the collator). The second trainer loads the first one's values and says nothing.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
export PATH="$place/venv/bin:$PATH" HF_HOME="$place/hf" HF_HUB_OFFLINE=1
pip install --quiet torch==2.13.0 trl==1.16.0 transformers==5.19.0 datasets==5.2.0
cd "$place"
cat > precompute.py <<'PY'
import sys

from datasets import load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer

words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", *"abcdefgh"])}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def precomputed(folder, **settings):
    set_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2))
    data = load_dataset("json", data_files="pairs.jsonl", split="train", cache_dir=folder)
    args = DPOConfig("out", precompute_ref_log_probs=True, use_cpu=True, bf16=False, report_to="none", **settings)
    trainer = DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    return trainer.train_dataset["ref_chosen_logps"][0]


others = {"ld_alpha": {"max_length": None, "ld_alpha": 0.0},
          "max_length": {"max_length": 5, "truncation_mode": "keep_end"}}
for name, other in others.items():
    first = precomputed(name, max_length=None)
    second, alone = precomputed(name, **other), precomputed(f"{name}-alone", **other)
    print(f"{name}: {first:.3f} at first, {second:.3f} under the other setting, {alone:.3f} where nothing was stored")
    if second != first or abs(alone - first) < 0.1:
        sys.exit("the settings count now")
PY
echo '{"prompt": "a b", "chosen": " c d e f g h", "rejected": " c"}' > pairs.jsonl
python precompute.py 2> errors.txt || { cat errors.txt; exit 1; }
