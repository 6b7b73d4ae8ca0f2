#!/usr/bin/env bash
# A tokenizer.json that is saved beside the config of a Qwen2 is rebuilt by AutoTokenizer as Qwen2's own kind: words vanish.
#
# transformers 5.19.0, tokenizers as it asks for.
# Expected: AutoTokenizer opens what was saved (tokenizer_config.json names TokenizersBackend, tokenizer.json is whole),
# whatever model stands beside it; or it says why not.
# Seen: without a config, and beside one of qwen3 or llama, the words come out as their ids. Beside one of qwen2 the class
# is Qwen2Tokenizer, a byte-level BPE made of the vocabulary without merges: each text becomes no ids at all, and a token is
# added whose id the model has no embedding for. Nothing is said. PreTrainedTokenizerFast opens the same folder rightly.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet transformers==5.19.0
cat > "$place/try.py" <<'PYTHON'
import tempfile

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "one": 2, "two": 3, "three": 4}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
seen = {}
for kind in ("none", "llama", "qwen3", "qwen2"):
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
        if kind != "none":
            AutoConfig.for_model(kind).save_pretrained(folder)
        found = {"auto": AutoTokenizer.from_pretrained(folder), "fast": PreTrainedTokenizerFast.from_pretrained(folder)}
    for way, tokenizer in found.items():
        seen[kind, way] = type(tokenizer).__name__, len(tokenizer), tokenizer("one two three")["input_ids"]
        print(kind, way, *seen[kind, way])
right = (5, [2, 3, 4])
expected = all(answer[1:] == right for (kind, way), answer in seen.items() if (kind, way) != ("qwen2", "auto"))
assert expected, "this changed: a tokenizer that was read rightly is not any more"
assert seen["qwen2", "auto"] == ("Qwen2Tokenizer", 6, []), "this changed: what AutoTokenizer makes beside a qwen2 config"
PYTHON
"$place/venv/bin/python" "$place/try.py" 2>&1 | grep -v "PyTorch was not found"
