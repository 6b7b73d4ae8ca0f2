"""How long the prompts and responses of two preference data sets are: lengths.json, quantiles of their prompts.

    python benchmarks/gpu/lengths.py --ultrafeedback PAIRS.jsonl --gsm8k PAIRS.jsonl      writes lengths.json anew

A prompt is [its tokens, those of each chosen response, those of each rejected one]; its pairs are every chosen with
every rejected response, as GSM8K's are made. Prompts are ordered by the tokens of all their pairs, and of equal parts
of that order the one in the middle is taken. Tokens are counted by a byte-level BPE of 32,000 made of these texts and
cut as Qwen2.5's cuts words (digits one by one), with what its chat template adds, at most 512 of the prompt and 1,024
of both.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_suffix(".json")
DATA = ("ultrafeedback", "gsm8k")
PROMPTS = {"ultrafeedback": 64, "gsm8k": 32}  # in the table
MOST, MOST_OF_PROMPT = 1024, 512  # tokens
OF_TEMPLATE = 30, 1  # tokens around a prompt (default system message), behind a response
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Prompt(NamedTuple):
    """Tokens of a prompt, and of its responses; every chosen makes a pair with every rejected one."""

    prompt: int
    chosen: list[int]
    rejected: list[int]

    @property
    def pair_tokens(self) -> int:
        return sum(2 * self.prompt + one + other for one in self.chosen for other in self.rejected)


def read_lengths(data: str) -> list[Prompt]:
    """The quantiles of one of DATA, shortest first."""
    return [Prompt(*row) for row in json.loads(FILE.read_text())[data]]


def shortened(prompts: list[Prompt], divisor: int) -> list[Prompt]:
    """All lengths over `divisor`, at least 2 tokens."""

    def short(tokens: int) -> int:
        return max(2, tokens // divisor)

    return [Prompt(short(p.prompt), [*map(short, p.chosen)], [*map(short, p.rejected)]) for p in prompts]


# ----------------------------------------------------------------------------------------------------------------------


def tokenizer_of(texts: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=32_000, show_progress=False))
    return tokenizer


def measure(rows: list[dict[str, Any]], tokenizer: Any) -> list[Prompt]:
    around, behind = OF_TEMPLATE
    found: dict[str, tuple[set[str], set[str]]] = {}
    for row in rows:
        chosen, rejected = found.setdefault(row["prompt"], (set(), set()))
        chosen.add(row["chosen"])
        rejected.add(row["rejected"])
    prompts = []
    for text, sides in found.items():
        prompt = min(MOST_OF_PROMPT, len(tokenizer.encode(text).ids) + around)
        room = MOST - prompt
        lengths = [sorted(min(room, len(tokenizer.encode(side).ids) + behind) for side in texts) for texts in sides]
        prompts.append(Prompt(prompt, *lengths))
    return sorted(prompts, key=lambda prompt: prompt.pair_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for data in DATA:
        parser.add_argument(f"--{data}", type=Path, required=True, help="JSON lines with prompt, chosen, rejected")
    options = parser.parse_args()
    rows = {data: [json.loads(line) for line in getattr(options, data).read_text().splitlines()] for data in DATA}
    tokenizer = tokenizer_of([row[side] for data in DATA for row in rows[data] for side in ("prompt", "chosen")])
    lines = []
    for data in DATA:
        prompts, count = measure(rows[data], tokenizer), PROMPTS[data]
        taken = [prompts[(2 * number + 1) * len(prompts) // (2 * count)] for number in range(count)]
        table = ",\n  ".join(json.dumps(prompt) for prompt in taken)
        lines.append(f'"{data}": [\n  {table}\n ]')
        all_pairs = sum(len(p.chosen) * len(p.rejected) for p in prompts)
        pairs = sum(len(p.chosen) * len(p.rejected) for p in taken)
        print(f"{data}: {len(prompts)} prompts, {sum(p.pair_tokens for p in prompts) / all_pairs:.0f} tokens a pair; ")
        print(f"  in the table {pairs} pairs of {sum(p.pair_tokens for p in taken) / pairs:.0f}")
    FILE.write_text("{\n " + ",\n ".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
