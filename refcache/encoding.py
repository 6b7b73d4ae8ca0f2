"""Texts and rows of preferences -> token ids, by the rules of `prepare` (docs/data.md), in memory."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.data.pairing import sameness
from pipeline.data.preferences import Preference, parse_pair, parse_supervised
from pipeline.data.shards import encoder_for
from pipeline.encoding.dialogues import Answer, Prompt, readable, text_of
from pipeline.encoding.encoder import Encoded, Unusable
from pipeline.errors import RequestError
from pipeline.model.tokenizer import open_tokenizer, read_template
from pipeline.params import ColumnNames, PrepareParams
from pipeline.published.files import BadRow, Row
from pipeline.published.forms import Forms
from pipeline.published.rows import PairRow

SHOWN_BAD_ROWS = 10  # in an error

Ids = npt.NDArray[np.int32]
Rows = pl.DataFrame | Iterable[Mapping[str, Any]]


class Side(NamedTuple):
    """A response under its prompt, as a reference is asked for it."""

    prompt_ids: Ids
    response_ids: Ids


class Pair(NamedTuple):
    """row: its number among the rows that were given, which may hold several pairs or, skipped, none."""

    row: int
    prompt: str
    chosen_text: str
    rejected_text: str
    chosen: Side
    rejected: Side

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.chosen, self.rejected


class TextEncoder:
    """Encodes as `prepare` does with the section `prepare` of params.yaml."""

    def __init__(self, tokenizer: Any, prepare: PrepareParams | None = None) -> None:
        """tokenizer: a transformers tokenizer, or the folder of one. prepare: None for its defaults; of it, the chat
        template, the limits, the forms and names of columns and on_bad_row count here.
        """
        self._params = prepare or PrepareParams()
        if isinstance(tokenizer, str | Path):
            tokenizer = open_tokenizer(Path(tokenizer))
        template = read_template(self._params.chat_template)
        if template is not None:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = template
        self.tokenizer = tokenizer
        self._chat = self._params.chat_template != "never" and tokenizer.chat_template is not None
        self._encoder = encoder_for(self._params, tokenizer, chat=self._chat, words=False)

    def side(self, prompt: Any, response: Any) -> Side:
        """One response under its prompt. prompt: text or messages; response: text or the assistant's message.

        Raises RequestError for what prepare would refuse, and for a prompt that it would drop as too long.
        """
        columns = ColumnNames()
        row = Row("this prompt and response", {columns.prompt: prompt, columns.completion: response})
        read = parse_supervised(row, columns, chat=self._chat)
        if isinstance(read, BadRow):
            raise RequestError(f"{read.where}: {read.reason}")
        [encoded] = self._encoder.encode([(read.prompt, read.completion)])
        if isinstance(encoded, Unusable):
            raise RequestError(f"{read.where}: {encoded.reason}")
        return Side(encoded.prompt_ids, encoded.response_ids)

    def pairs(self, rows: Rows) -> list[Pair]:
        """The pairs of rows in any of the forms that prepare reads, in order.

        Raises RequestError naming the rows that can't be used; with prepare.on_bad_row skip they are left out, and a
        warning says how many.
        """
        read, bad = self._preferences(_listed(rows))
        encoded = iter(self._encoder.encode([text for _, found in read for text in _texts(found)]))
        pairs = []
        for (number, preference), chosen, rejected in zip(read, encoded, encoded, strict=True):
            unusable = next((side for side in (chosen, rejected) if isinstance(side, Unusable)), None)
            if unusable is not None:
                bad.append(BadRow(f"row {number}", unusable.reason))
            elif isinstance(chosen, Encoded) and isinstance(rejected, Encoded):
                if same := sameness(chosen, rejected, self._params.max_tokens):
                    bad.append(BadRow(f"row {number}", same))
                else:
                    pairs.append(_pair(number, preference, chosen, rejected))
        if bad:
            self._judge(bad)
        return pairs

    def _preferences(self, rows: Iterable[Mapping[str, Any]]) -> tuple[list[tuple[int, Preference]], list[BadRow]]:
        forms = Forms(self._params, chat=self._chat)
        read, bad = list[tuple[int, Preference]](), list[BadRow]()
        for number, values in enumerate(rows):
            if not isinstance(values, Mapping):
                raise RequestError(
                    f"Row {number} of the pairs is {type(values).__name__}, expected a mapping from columns to values."
                )
            for found in self._of_row(forms, Row(f"row {number}", dict(values))):
                if isinstance(found, BadRow):
                    bad.append(found)
                else:
                    read.append((number, found))
        return read, bad

    def _of_row(self, forms: Forms, row: Row) -> Iterator[Preference | BadRow]:
        for part in forms.read(row):
            if isinstance(part, PairRow):
                yield from parse_pair(part, row.where, chat=self._chat)
            elif isinstance(part, BadRow):
                yield part
            else:
                yield BadRow(row.where, "it holds one response with a label; a chosen and a rejected one are needed")

    def _judge(self, bad: Sequence[BadRow]) -> None:
        listed = "".join(f"\n  {row.where}: {row.reason}" for row in bad[:SHOWN_BAD_ROWS])
        more = f"\n  and {len(bad) - SHOWN_BAD_ROWS:,} more" if len(bad) > SHOWN_BAD_ROWS else ""
        found = f"{len(bad):,} {'row' if len(bad) == 1 else 'rows'} can't be used:{listed}{more}"
        if self._params.on_bad_row == "fail":
            raise RequestError(f"{found}\nCorrect them, or give prepare=PrepareParams(on_bad_row='skip').")
        warnings.warn(found, stacklevel=3)


def _listed(rows: Rows) -> Iterable[Mapping[str, Any]]:
    if isinstance(rows, pl.DataFrame):
        return rows.to_dicts()
    # A frame's columns and a row's values can be iterated as well, and would be taken for rows.
    if isinstance(rows, str | Mapping | pl.LazyFrame) or hasattr(rows, "columns") or not isinstance(rows, Iterable):
        kind = f"{type(rows).__module__.partition('.')[0]}.{type(rows).__name__}"
        raise RequestError(
            f"The pairs are a {kind}; expected a polars DataFrame or a list of rows, each a mapping from columns to "
            "values. Of a pandas frame that is frame.to_dict('records'), of a LazyFrame frame.collect()."
        )
    return rows


def _texts(pair: Preference) -> list[tuple[Prompt, Answer]]:
    return [(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]


def _pair(number: int, pair: Preference, chosen: Encoded, rejected: Encoded) -> Pair:
    sides = (Side(side.prompt_ids, side.response_ids) for side in (chosen, rejected))
    return Pair(number, readable(pair.prompt), text_of(pair.chosen), text_of(pair.rejected), *sides)
