"""What was met on the way through the rows, and what summary.json says of them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.spool import Kept
from pipeline.published.files import BadRow

KEPT_BAD_ROWS = 20


@dataclass
class BadRows:
    """How many there were, and the first of them."""

    count: int = 0
    first: list[BadRow] = field(default_factory=list)

    def add(self, row: BadRow) -> None:
        self.count += 1
        if len(self.first) < KEPT_BAD_ROWS:
            self.first.append(row)


@dataclass
class LongPrompts:
    """Prompts above prepare.max_prompt_tokens that were dropped."""

    prompts: set[bytes] = field(default_factory=set)
    rows: int = 0


@dataclass
class Tally:
    """What was met on the way through some rows."""

    bad: BadRows = field(default_factory=BadRows)
    long: LongPrompts = field(default_factory=LongPrompts)
    forms: Counter[str] = field(default_factory=Counter)  # rows by form
    ties: int = 0
    seen: set[str] = field(default_factory=set)  # columns that hold something
    used: set[str] = field(default_factory=set)  # columns that any row's meaning was taken from
    unrendered: Counter[str] = field(default_factory=Counter)  # dialogues by field
    within: int = 0  # rows of feedback without another prompt near

    def add(self, other: "Tally") -> None:
        """What was met in the rows after these."""
        self.bad.count += other.bad.count
        self.bad.first = [*self.bad.first, *other.bad.first][:KEPT_BAD_ROWS]
        self.long.prompts |= other.long.prompts
        self.long.rows += other.long.rows
        self.forms += other.forms
        self.ties += other.ties
        self.seen |= other.seen
        self.used |= other.used
        self.unrendered += other.unrendered
        self.within += other.within

    def to_json(self) -> dict[str, Any]:
        return {
            "bad": {"count": self.bad.count, "first": self.bad.first},
            "long": {"prompts": sorted(key.hex() for key in self.long.prompts), "rows": self.long.rows},
            "forms": dict(self.forms),
            "ties": self.ties,
            "seen": sorted(self.seen),
            "used": sorted(self.used),
            "unrendered": dict(self.unrendered),
            "within": self.within,
        }

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> Self:
        bad = BadRows(found["bad"]["count"], [BadRow(*row) for row in found["bad"]["first"]])
        long = LongPrompts({bytes.fromhex(key) for key in found["long"]["prompts"]}, found["long"]["rows"])
        forms, unrendered = Counter(found["forms"]), Counter(found["unrendered"])
        columns = set(found["seen"]), set(found["used"])
        return cls(bad, long, forms, found["ties"], *columns, unrendered, found["within"])


class PairCounts:
    """What summary.json says of the pairs and responses that are written."""

    def __init__(self, kept: Kept, long: LongPrompts) -> None:
        self._kept, self._long = kept, long
        self._categories: Counter[str] = Counter()
        self._responses = self._response_tokens = self._truncated = self._longest = self._longest_sequence = 0

    def add_pairs(self, table: pa.Table) -> None:
        self._categories.update(table["category"].drop_null().to_pylist())

    def add_responses(self, table: pa.Table) -> None:
        lengths, prompts = (pc.list_value_length(table[name]).to_numpy() for name in ("response_ids", "prompt_ids"))
        self._responses += table.num_rows
        self._response_tokens += int(lengths.sum())
        self._truncated += pc.sum(table["truncated"]).as_py()
        self._longest = max(self._longest, int(lengths.max()))
        self._longest_sequence = max(self._longest_sequence, int((lengths + prompts).max()))

    def counts(self) -> dict[str, Any]:
        pairs = self._kept.keys
        feedback = self._kept.feedback_keys
        columns = ["prompt_key", "split", "prompt_tokens", "prompt_truncated"]
        both = pl.concat([table.select(columns) for table in (feedback, pairs)])
        prompts = both.unique("prompt_key", keep="last")
        sides = ("train", "test")
        return {
            "pairs": {side: pairs.filter(split=side).height for side in sides},
            "prompts": {side: prompts.filter(split=side).height for side in sides},
            "distinct_responses": self._responses,
            "tokens": {
                "prompts": int(prompts["prompt_tokens"].cast(pl.Int64).sum()),
                "responses": self._response_tokens,
                "longest_response": self._longest,
                "longest_sequence": self._longest_sequence,
            },
            "truncated_responses": self._truncated,
            "truncated_prompts": int(prompts["prompt_truncated"].sum()),
            "dropped_prompts_too_long": len(self._long.prompts),
            "dropped_pairs_prompt_too_long": self._long.rows,
            "train_prompts_also_in_test": self._kept.overlap,
            "duplicate_pairs": self._kept.duplicates,
            "category_counts": dict(sorted(self._categories.items())),
            "feedback": {side: feedback.filter(split=side).height for side in sides},
            "desirable": {side: feedback.filter(split=side, desirable=True).height for side in sides},
        }
