#!/usr/bin/env bash
# `accelerate launch --cpu` trains without DeepSpeed, although the script's TrainingArguments configure it.
#
# transformers 5.19.0, accelerate 1.15.0, deepspeed 0.19.8, torch 2.13.0, on CPU, one process.
# Expected: DeepSpeed trains, as it does when the same script is started by `python` with `use_cpu=True`, or the two are
# refused together, as the launcher refuses `--cpu --use_deepspeed`.
# Seen: the launcher sets ACCELERATE_USE_CPU, and with that the model trains as it is: no ZeRO stage, no offload, nothing
# of the configuration takes part, and no error or warning says so.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
export PATH="$place/venv/bin:$PATH"
pip install --quiet torch==2.13.0 transformers==5.19.0 accelerate==1.15.0 setuptools
pip install --quiet --no-build-isolation deepspeed==0.19.8
cd "$place"
cat > train.py <<'PY'
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (8, 12))]
config = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
}
arguments = TrainingArguments("out", per_device_train_batch_size=4, max_steps=2, save_strategy="no", report_to="none",
                              disable_tqdm=True, use_cpu=True, deepspeed=config)
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=2))
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
print("trained by", type(trainer.model_wrapped).__name__)
PY
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=

run() {
  "$@" > said.txt 2> errors.txt || { cat errors.txt; exit 1; }
  echo "$(basename "$1"): $(grep "trained by" said.txt)"
}

(export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29543; run python train.py)
grep -q "trained by DeepSpeedEngine" said.txt
run accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no train.py
grep -q "trained by Qwen2ForCausalLM" said.txt
if grep -i "deepspeed" errors.txt; then echo "it is told now"; exit 1; fi
