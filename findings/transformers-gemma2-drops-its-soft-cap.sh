#!/usr/bin/env bash
# Gemma 2, loaded with the default attention, computes without the soft cap of attention scores that its config states.
#
# transformers 5.19.0, torch 2.13.0, on CPU, float32.
# Expected: attn_logit_softcapping takes part in the forward, or loading says that the chosen attention can't.
# Seen: sdpa is chosen, and log-probs are the same bit by bit whatever attn_logit_softcapping is; eager attention
# applies it. Where scores come near the cap the two differ by more than a nat. No warning, no error.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0
cd "$place"
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PY'
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

ids = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def log_probs(cap, **options):
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16)
    config.num_attention_heads = config.num_key_value_heads = 2
    config.initializer_range, config.query_pre_attn_scalar, config.attn_logit_softcapping = 0.5, 16, cap
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.inference_mode():
        return model.config._attn_implementation, model(ids).logits.log_softmax(-1)


chosen, with_cap = log_probs(5.0)
_, without = log_probs(None)
_, eager_with = log_probs(5.0, attn_implementation="eager")
_, eager_without = log_probs(None, attn_implementation="eager")
print(f"chosen: {chosen}; cap changes its log-probs by {float((with_cap - without).abs().max()):.3g} nats")
print(f"eager: cap changes its log-probs by {float((eager_with - eager_without).abs().max()):.3g} nats")
assert chosen == "sdpa", f"{chosen} is chosen now"
assert torch.equal(with_cap, without), "the cap takes part now"
assert (eager_with - eager_without).abs().max() > 0.1
PY
