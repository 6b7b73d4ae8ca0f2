"""What people want to know of their pairs before they score them: within the rules, and probably not what was meant."""

import sys
from collections.abc import Iterable
from typing import Any

import polars as pl
import pyarrow as pa

from pipeline.published.forms import FORMS

# Name in summary.json -> (what is counted, what to do).
_TEXTS = {
    "pairs_rewarded_otherwise": (
        "pairs whose chosen_reward is not above their rejected_reward",
        "are columns swapped?",
    ),
    "prompts_with_both_orders": ("prompts that hold a pair and its reverse", "their preferences cancel out"),
    "responses_with_special_tokens": (
        "responses that hold special tokens of the tokenizer as text",
        "were they rendered before? Then set prepare.chat_template: never",
    ),
    "prompts_with_special_tokens": (
        "prompts that hold special tokens of the tokenizer as text",
        "were they rendered before? Then set prepare.chat_template: never",
    ),
    "responses_that_repeat_their_prompt": ("responses that begin with their prompt", "it would be scored twice"),
}


class Notices:
    """Counts of each for summary.json, from the tables as they are written."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        self._special = [token for token in special_tokens if len(token) > 1]
        self._rendered_prompts: set[bytes] = set()
        self.counts = dict.fromkeys(_TEXTS, 0)

    def add_pairs(self, table: pa.Table) -> None:
        rewards = pl.DataFrame(table.select(["chosen_reward", "rejected_reward"]))
        otherwise = rewards.filter(pl.col("chosen_reward") <= pl.col("rejected_reward"))
        self.counts["pairs_rewarded_otherwise"] += otherwise.height
        if self._special:
            prompts = pl.DataFrame(table.select(["prompt_key", "prompt_text"]))
            held = prompts["prompt_text"].str.contains_any(self._special)
            self._rendered_prompts.update(prompts.filter(held)["prompt_key"])
            self.counts["prompts_with_special_tokens"] = len(self._rendered_prompts)

    def add_responses(self, table: pa.Table) -> None:
        texts = pl.DataFrame(table.select(["prompt_text", "response_text"]))
        if self._special:
            held = texts["response_text"].str.contains_any(self._special)
            self.counts["responses_with_special_tokens"] += int(held.sum())
        repeated = pl.col("response_text").str.starts_with(pl.col("prompt_text")) & (pl.col("prompt_text") != "")
        self.counts["responses_that_repeat_their_prompt"] += texts.filter(repeated).height

    def add_keys(self, keys: pl.DataFrame) -> None:
        """Of all pairs."""
        order = keys.select("prompt_key", "chosen_key", "rejected_key")
        # A pair's sides as they lie in the reverse of another one.
        reverse = order.join(order, left_on=["chosen_key", "rejected_key"], right_on=["rejected_key", "chosen_key"])
        self.counts["prompts_with_both_orders"] = reverse["prompt_key"].n_unique()


def tell(counts: dict[str, Any]) -> None:
    """One line on stderr for each that there is; counts as in summary.json."""
    for form, rows in counts["forms"].items():
        if FORMS[form].says:
            print(f"prepare: {rows:,} row{'s' * (rows > 1)} read as {form}: {FORMS[form].says}", file=sys.stderr)
    if counts["dropped_ties"]:
        print(f"prepare: ties left out: {counts['dropped_ties']:,}", file=sys.stderr)
    for name, dialogues in counts["fields_not_rendered"].items():
        print(
            f"prepare: the chat template renders nothing of {name} in {dialogues:,} of the dialogues", file=sys.stderr
        )
    if counts["feedback_without_other_prompts"]:
        print(
            f"prepare: {counts['feedback_without_other_prompts']:,} rows of feedback stand near no other prompt, so "
            "their mismatched response answers the same one; KTO's baseline is then no estimate of a divergence",
            file=sys.stderr,
        )
    if counts["unused_columns"]:
        names = ", ".join(counts["unused_columns"])
        print(f"prepare: columns not used: {names}. prepare.columns names those that are.", file=sys.stderr)
    for name, (what, remedy) in _TEXTS.items():
        if counts[name]:
            print(f"prepare: {counts[name]:,} {what}; {remedy}", file=sys.stderr)
