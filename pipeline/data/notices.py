"""What people want to know of their pairs before they score them: within the rules, and probably not what was meant."""

import sys
from collections.abc import Iterable
from typing import Any

import polars as pl
import pyarrow as pa

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
    "responses_that_repeat_their_prompt": ("responses that begin with their prompt", "it would be scored twice"),
}


def notices(pairs: pa.Table, responses: pa.Table, special_tokens: Iterable[str]) -> dict[str, int]:
    """How many of each, for summary.json; pairs and responses as they are written."""
    both, texts = pl.DataFrame(pairs), pl.DataFrame(responses)
    # A pair's sides as they lie in the reverse of another one.
    order = both.select("prompt_key", "chosen_key", "rejected_key")
    reverse = order.join(order, left_on=["chosen_key", "rejected_key"], right_on=["rejected_key", "chosen_key"])
    named = [token for token in special_tokens if len(token) > 1]
    text = pl.col("response_text")
    special = text.str.contains_any(named) if named else pl.lit(False)
    repeated = text.str.starts_with(pl.col("prompt_text")) & (pl.col("prompt_text") != "")
    return {
        "pairs_rewarded_otherwise": both.filter(pl.col("chosen_reward") <= pl.col("rejected_reward")).height,
        "prompts_with_both_orders": reverse["prompt_key"].n_unique(),
        "responses_with_special_tokens": texts.filter(special).height,
        "responses_that_repeat_their_prompt": texts.filter(repeated).height,
    }


def tell(counts: dict[str, Any], unused_columns: list[str]) -> None:
    """One line on stderr for each that there is."""
    if unused_columns:
        names = ", ".join(unused_columns)
        print(f"prepare: columns not used: {names}. prepare.columns names those that are.", file=sys.stderr)
    for name, (what, remedy) in _TEXTS.items():
        if counts[name]:
            print(f"prepare: {counts[name]:,} {what}; {remedy}", file=sys.stderr)
