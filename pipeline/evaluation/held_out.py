"""The test split that policies are compared on."""

from pathlib import Path
from typing import NamedTuple

import polars as pl

from cache import Reference
from pipeline.data.tables import read_pairs, read_responses
from pipeline.errors import RequestError

# Without the responses' texts, which nothing here reads.
RESPONSE_COLUMNS = [
    "response_key",
    "prompt_key",
    "prompt_ids",
    "response_ids",
    "truncated",
    "prompt_text",
    "reward",
]


class HeldOut(NamedTuple):
    """The test split: keys and categories of the pairs, their distinct responses (RESPONSE_COLUMNS), and the
    reference's summed log-probs of them."""

    pairs: pl.DataFrame
    responses: pl.DataFrame
    cached: Reference


def read_held_out(pairs: Path, cached: Reference) -> HeldOut:
    """Raises RequestError where there are no test pairs, CacheIncomplete where a response was never scored."""
    test = read_pairs(pairs, "test", ["prompt_key", "chosen_key", "rejected_key", "category"])
    if test.is_empty():
        raise RequestError(
            f"{pairs} has no test pairs, so there is nothing to evaluate on. Set prepare.test_share above 0, or name "
            "prepare.files.test_pairs or prepare.hub.test_split (beside unpaired feedback: pairs), and run `dvc repro`."
        )
    responses = read_responses(pairs, "test", RESPONSE_COLUMNS)
    cached.rows(responses["response_key"], ["sum_logp"])  # incomplete? say so before minutes of sampling
    return HeldOut(test, responses, cached)
