"""Prepared suites as `evaluate` needs them: which responses every policy scores, and what their log-probs come to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import polars as pl

from cache import Reference
from pipeline.data.suites import read_suite_rows, suite_folders
from pipeline.data.tables import RESPONSES_SCHEMA, read_pairs, read_responses
from pipeline.errors import RequestError
from pipeline.evaluation.suites import Ints, SuiteLayout, Sums, suite_metrics
from pipeline.params import SuiteParams


class _Suite(NamedTuple):
    """chosen, rejected: response keys of each pair, in the order of `layout`; reference: its sums of these."""

    domain: str
    ties: bool
    chosen: Sequence[bytes]
    rejected: Sequence[bytes]
    layout: SuiteLayout
    reference: Sums


class Suites:
    """The suites of one run. responses: the distinct ones of all suites, in the columns of responses.parquet."""

    def __init__(self, suites: Mapping[str, _Suite], responses: pl.DataFrame) -> None:
        self._suites, self.responses = suites, responses

    @classmethod
    def none(cls) -> Self:
        return cls({}, pl.DataFrame(RESPONSES_SCHEMA.empty_table()))

    @classmethod
    def read(cls, folder: Path, params: Mapping[str, SuiteParams], cached: Reference) -> Self:
        """The prepared suites in `folder`, which must be those of `params`; cached: the reference's log-probs of them.

        Raises RequestError where other suites were prepared, CacheIncomplete for responses that were not scored.
        """
        folders = suite_folders(folder)
        if folders.keys() != params.keys():
            raise RequestError(
                f"{folder} holds {_listing(folders)}, evaluate.suites names {_listing(params)}. Run `dvc repro "
                "evaluate`, which prepares and scores those that are new."
            )
        if not folders:
            return cls.none()
        responses = {name: read_responses(path) for name, path in folders.items()}
        found = {name: _read(folders[name], suite, responses[name], cached) for name, suite in params.items()}
        return cls(found, pl.concat(responses.values()).unique("response_key", maintain_order=True))

    def metrics(self, sums: Mapping[bytes, float], *, beta: float) -> dict[str, dict[str, Any]]:
        """{suite: what docs/report.md says of one}; sums: the policy's summed log-probs of `responses`, nats."""
        return {name: _metrics(suite, sums, beta) for name, suite in self._suites.items()}


def _read(folder: Path, params: SuiteParams, responses: pl.DataFrame, cached: Reference) -> _Suite:
    pairs, rows = read_pairs(folder), read_suite_rows(folder)
    tokens = dict(zip(responses["response_key"], responses["response_ids"].list.len(), strict=True))
    ids = dict(rows.iter_rows())
    chosen, rejected = pairs["chosen_key"].to_list(), pairs["rejected_key"].to_list()
    answers = _numbered([*chosen, *rejected])
    layout = SuiteLayout(
        prompt=_numbered(pairs["prompt_key"].to_list()),
        row=_numbered(pairs["source"].to_list()),
        chosen=answers[: len(chosen)],
        rejected=answers[len(chosen) :],
        chosen_tokens=np.array([tokens[key] for key in chosen], dtype=np.int64),
        rejected_tokens=np.array([tokens[key] for key in rejected], dtype=np.int64),
        category=np.array(pairs["category"].to_list(), dtype=object),
        row_id=np.array([ids[source] for source in pairs["source"]], dtype=object),
    )
    reference = Sums(cached.sum_logps(chosen), cached.sum_logps(rejected))
    return _Suite(params.domain, params.ties, chosen, rejected, layout, reference)


def _numbered(values: Sequence[Any]) -> Ints:
    """Equal values get equal numbers, in the order in which they come."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return np.array([numbers[value] for value in values], dtype=np.int64)


def _metrics(suite: _Suite, sums: Mapping[bytes, float], beta: float) -> dict[str, Any]:
    policy = Sums(*(np.array([sums[key] for key in keys]) for keys in (suite.chosen, suite.rejected)))
    measured = suite_metrics(suite.layout, policy, suite.reference, beta=beta, ties=suite.ties)
    return {"domain": suite.domain, **measured}


def _listing(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)) or "no suite"
