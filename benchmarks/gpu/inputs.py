"""Part `inputs`: a Qwen2.5-0.5B with random weights, and prepared pairs of random tokens as long as real ones."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.gpu.child import Sizes, device, emit, parse
from benchmarks.gpu.lengths import DATA, Prompt, read_lengths, shortened
from cache import prompt_key, response_key
from pipeline.data.tables import PAIRS_SCHEMA, RESPONSES_SCHEMA, write_table

END = 2


def draw_prompts(table: list[Prompt], pairs: int, random: np.random.Generator) -> list[Prompt]:
    """Prompts of the table, over and over in new orders, until they have as many pairs; the last one may be cut."""
    found: list[Prompt] = []
    left = pairs
    while left:
        for number in random.permutation(len(table)):
            prompt, chosen, rejected = table[number]
            rejected = rejected[: max(1, left // len(chosen))]
            chosen = chosen[: left // len(rejected)]
            left -= len(chosen) * len(rejected)
            if not chosen:
                break
            found.append(Prompt(prompt, chosen, rejected))
    return found


def write_pairs(folder: Path, prompts: list[Prompt], vocabulary: int, random: np.random.Generator) -> None:
    """What `refcache prepare` writes, with random token ids and without texts."""

    def ids(count: int) -> list[int]:
        return random.integers(END + 1, vocabulary, count).tolist()

    pairs, responses = [], []
    no_texts = {"prompt_text": "", "split": "train"}
    for number, (length, *sides) in enumerate(prompts):
        prompt = ids(length)
        shared = no_texts | {"prompt_key": prompt_key(prompt)}
        keys: list[list[bytes]] = []
        for lengths in sides:
            answers = [[*ids(tokens - 1), END] for tokens in lengths]
            keys.append([response_key(prompt, answer) for answer in answers])
            responses += [
                shared
                | {"response_key": key, "prompt_ids": prompt, "response_ids": answer, "truncated": False}
                | {"response_text": "", "reward": None}
                for key, answer in zip(keys[-1], answers, strict=True)
            ]
        pairs += [
            shared
            | {"pair_id": 0, "chosen_key": chosen, "rejected_key": rejected, "category": None, "chosen_text": ""}
            | {"rejected_text": "", "chosen_reward": None, "rejected_reward": None, "source": f"made up:{number + 1}"}
            for chosen in keys[0]
            for rejected in keys[1]
        ]
    pairs = [pair | {"pair_id": number} for number, pair in enumerate(pairs)]
    responses.sort(key=lambda row: row["response_key"])
    write_table(pa.Table.from_pylist(pairs, PAIRS_SCHEMA), folder / "pairs.parquet", PAIRS_SCHEMA)
    write_table(pa.Table.from_pylist(responses, RESPONSES_SCHEMA), folder / "responses.parquet", RESPONSES_SCHEMA)


def write_model(folder: Path, sizes: Sizes) -> int:
    """Its parameters. In bf16, as models are published: then everybody's float32 masters start from equal weights."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    with device():
        model = Qwen2ForCausalLM(Qwen2Config(**sizes.model, bos_token_id=None, eos_token_id=END)).bfloat16()
    model.cpu().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "</s>": END}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return model.num_parameters()


def main() -> None:
    options, sizes = parse(__doc__)
    for data in DATA:
        random = np.random.default_rng(0)
        prompts = draw_prompts(shortened(read_lengths(data), sizes.divisor), sizes.pairs, random)
        write_pairs(options.work / data, prompts, sizes.model["vocab_size"], random)
        pairs = sum(len(prompt.chosen) * len(prompt.rejected) for prompt in prompts)
        tokens = sum(prompt.pair_tokens for prompt in prompts)
        emit("data", data=data, pairs=pairs, prompts=len(prompts), tokens_per_pair=tokens / pairs)
    emit("model", parameters=write_model(options.work / "model", sizes))


if __name__ == "__main__":
    main()
