"""Prepared pairs, a tokenizer that cuts characters apart, and a reference cache with made-up log-probs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from cache import logps_table, prompt_key, publish_reference, response_key
from pipeline.browse.pairs import Browsed, Choice, write_browser
from pipeline.data.tables import PAIRS_SCHEMA, RESPONSES_SCHEMA, write_table
from pipeline.model.tokenizer import END, train_tokenizer
from tests.cache.rows import identity

ALL = Choice(split=None, limit=None, sample=None, seed=0)


@dataclass
class Inputs:
    """A pair is (prompt, chosen, rejected, fields of PAIRS_SCHEMA that differ from the plain ones)."""

    root: Path
    pairs: list[tuple[str, str, str, dict]]
    unscored: set[str] = field(default_factory=set)  # texts of responses that the cache lacks
    logps: dict[bytes, np.ndarray] = field(default_factory=dict)  # by response key, what the cache was given

    def __post_init__(self) -> None:
        self.tokenizer = train_tokenizer([text for pair in self.pairs for text in pair[:3] if text.isascii()], 400)
        self.tokenizer.save_pretrained(self.root / "tokenizer")
        rows = {key: row for pair in self.pairs for key, row in self._responses(pair)}
        listed = [rows[key] for key in sorted(rows)]
        tables = (
            ("pairs", [self._pair(n) for n in range(len(self.pairs))], PAIRS_SCHEMA),
            ("responses", listed, RESPONSES_SCHEMA),
        )
        for name, table, schema in tables:
            write_table(pa.Table.from_pylist(table, schema), self.root / f"pairs/{name}.parquet", schema)
        random = np.random.default_rng(0)
        scored = [row for row in listed if row["response_text"] not in self.unscored]
        for row in scored:
            self.logps[row["response_key"]] = -random.exponential(2, len(row["response_ids"])).astype(np.float32)
        table = logps_table(
            response_keys=[row["response_key"] for row in scored],
            prompt_keys=[row["prompt_key"] for row in scored],
            n_prompt_tokens=[len(row["prompt_ids"]) for row in scored],
            token_ids=[row["response_ids"] for row in scored],
            token_logps=[self.logps[row["response_key"]] for row in scored],
        )
        publish_reference(self.root / "logps", table, identity())

    def ids(self, text: str, end: str = "") -> list[int]:
        return self.tokenizer.encode(text + end, add_special_tokens=False)

    def key(self, pair: int, side: int) -> bytes:
        """side: 1 chosen, 2 rejected."""
        return response_key(self.ids(self.pairs[pair][0]), self.ids(self.pairs[pair][side], END))

    def browse(self, choice: Choice = ALL, answers: Path | None = None, policies: Sequence[Path] = ()) -> Browsed:
        return write_browser(
            pairs=self.root / "pairs",
            reference=self.root / "logps",
            tokenizer=self.root / "tokenizer",
            out=self.root / "browse",
            choice=choice,
            answers=answers,
            policies=policies,
        )

    def _responses(self, pair: tuple[str, str, str, dict]):
        prompt = self.ids(pair[0])
        for text in pair[1:3]:
            ids = self.ids(text, END)
            row = {"prompt_key": prompt_key(prompt), "split": pair[3].get("split", "train"), "prompt_ids": prompt}
            row |= {"response_key": response_key(prompt, ids), "response_ids": ids, "truncated": False, "reward": None}
            yield row["response_key"], row | {"prompt_text": pair[0], "response_text": text}

    def _pair(self, number: int) -> dict:
        prompt, chosen, rejected, more = self.pairs[number]
        return {
            "pair_id": number,
            "split": "train",
            "prompt_key": prompt_key(self.ids(prompt)),
            "chosen_key": self.key(number, 1),
            "rejected_key": self.key(number, 2),
            "category": None,
            "prompt_text": prompt,
            "chosen_text": chosen,
            "rejected_text": rejected,
            "chosen_reward": None,
            "rejected_reward": None,
            "source": f"pairs.jsonl:{number + 1}",
        } | more


def write_samples(folder: Path, cell: str, rows: list[dict]) -> Path:
    """rows: prompt_key, author, text and log-probs, as evaluate keeps them."""
    kinds = {"prompt_key": pl.Binary, "author": pl.String, "text": pl.String, "n_tokens": pl.Int32}
    kinds |= {"policy_logp": pl.Float64, "reference_logp": pl.Float64, "true_reward": pl.Float64}
    (folder / cell).mkdir(parents=True)
    pl.DataFrame(rows, schema=kinds).write_parquet(folder / cell / "samples.parquet")
    return folder
