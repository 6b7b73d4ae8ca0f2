"""Two small tasks in the harness's YAML, a model that answers them, and what the harness's own `hf` makes of both."""

import json
from pathlib import Path
from typing import Any

from pipeline.model.tokenizer import open_tokenizer, train_tokenizer
from tests.tiny import EOS, write_model

CAPITALS = {
    "France": "Paris",
    "Spain": "Madrid",
    "Italy": "Rome",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Poland": "Warsaw",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Japan": "Tokyo",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Cuba": "Havana",
    "Canada": "Ottawa",
    "Ireland": "Dublin",
    "Hungary": "Budapest",
    "Portugal": "Lisbon",
    "Finland": "Helsinki",
    "Iceland": "Reykjavik",
}
LETTERS = "abcde"


def choices(*, long: bool = False) -> list[dict[str, Any]]:
    cities = list(CAPITALS.values())
    return [
        {
            "question": _note(index, long) + f"The capital of {country} is",
            "choices": [cities[(index + step) % len(cities)] for step in (3, 0, 7)] + [f"{city} of course"],
            "answer": 1,
        }
        for index, (country, city) in enumerate(CAPITALS.items())
    ]


def texts(*, long: bool = False) -> list[dict[str, Any]]:
    return [
        {
            "question": _note(index, long) + f"Name a letter of {country}.",
            "answer": LETTERS[index % len(LETTERS)],
        }
        for index, country in enumerate(CAPITALS)
    ]


def _note(index: int, long: bool) -> str:
    return f"Note {index}: " + "a traveller went from Oslo to Rome. " * (index // 2) if long else ""


CHOICE_TASK = """
task: small_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""

TEXT_TASK = """
task: small_text
dataset_path: json
dataset_kwargs: {data_files: {test: %s, train: %s}}
test_split: test
fewshot_split: train
num_fewshot: 1
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: answer
generation_kwargs: {until: [%s], do_sample: false, max_gen_toks: 24}
filter_list:
  - name: first-letter
    filter: [{function: regex, regex_pattern: "([a-e])"}, {function: take_first}]
  - name: all
    filter: [{function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tasks(folder: Path, *, long: bool = False, until: str = "the, Q") -> Path:
    """small_choice and small_text; long: with contexts of up to some 150 tokens."""
    tasks, data = folder / "tasks", folder / "items"
    tasks.mkdir(parents=True)
    data.mkdir()
    asked, told = write_lines(data / "texts.jsonl", texts(long=long)), write_lines(data / "told.jsonl", texts())
    (tasks / "choice.yaml").write_text(CHOICE_TASK % write_lines(data / "choices.jsonl", choices(long=long)))
    (tasks / "text.yaml").write_text(TEXT_TASK % (asked, told, until))
    return tasks


def write_chat_model(folder: Path, *, seed: int = 0, positions: int = 300) -> Path:
    """The tiny model with a tokenizer that has bytes, words of the tasks, and a chat template."""
    lines = [row["question"] for row in choices() + texts()] + list(CAPITALS.values())
    tokenizer = train_tokenizer(lines * 3, 500)
    write_model(
        folder,
        seed=seed,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=positions,
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    tokenizer.save_pretrained(folder)
    # The tiny pairs' responses end with the second token, and answers with it or the tokenizer's own end.
    ends = {"eos_token_id": [tokenizer.eos_token_id, EOS]}
    (folder / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    return folder


def of_hf(model: Path, tasks: Path, *, max_length: int, template: bool, **options: Any) -> dict[str, Any]:
    """What `lm_eval --model hf --batch_size 1` finds on the tasks of a folder."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(
        pretrained=str(model),
        tokenizer=open_tokenizer(model),
        device="cpu",
        dtype="float32",
        batch_size=1,
        max_length=max_length,
    )
    found: dict[str, Any] = simple_evaluate(
        model=lm,
        tasks=[str(file) for file in sorted(tasks.glob("*.yaml"))],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=template,
        fewshot_as_multiturn=template,
        bootstrap_iters=1,
        **options,
    )
    return found
