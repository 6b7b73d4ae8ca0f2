"""The prepare stage: rows -> sft rows, tokenizer, pairs and distinct responses, and a summary of what was left out.

Three separate outputs on purpose: sft rows and tokenizer decide the reference model, so pairs may be added without
touching either, and every cached reference value stays valid.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.dialogues import readable, text_of
from pipeline.data.encoding import Encoder, Limits
from pipeline.data.files import BadRow
from pipeline.data.inputs import Inputs, read_inputs
from pipeline.data.notices import notices, tell
from pipeline.data.pairing import PairTables, SupervisedTable, pair_tables, supervised_table
from pipeline.data.tables import PAIRS_SCHEMA, RESPONSES_SCHEMA, SFT_SCHEMA, write_table
from pipeline.errors import RequestError
from pipeline.files import write_json
from pipeline.model.tokenizer import load_tokenizer, read_template, train_tokenizer
from pipeline.params import ModelParams, PrepareParams

SHOWN_BAD_ROWS = 10  # in an error
KEPT_BAD_ROWS = 20  # in the summary


class _Prepared(NamedTuple):
    supervised: SupervisedTable
    pairs: PairTables
    tokenizer: Any
    summary: dict[str, Any]


def prepare_data(
    params: PrepareParams,
    model: ModelParams,
    *,
    sft: Path,
    tokenizer: Path,
    pairs: Path,
    summary: Path,
    on_bad_row: str | None = None,
) -> dict[str, Any]:
    """Write the four outputs and return the summary. on_bad_row: "fail" or "skip", instead of params.on_bad_row.

    Raises RequestError for wrong input, with nothing written and earlier outputs untouched.
    """
    prepared = _prepare(params, model, on_bad_row or params.on_bad_row)
    _refuse_foreign_folder(tokenizer)
    outputs = [sft, tokenizer, pairs / "pairs.parquet", pairs / "responses.parquet", summary]
    with _staged(outputs) as (new_sft, new_tokenizer, new_pairs, new_responses, new_summary):
        write_table(prepared.supervised.table, new_sft, SFT_SCHEMA)
        prepared.tokenizer.save_pretrained(new_tokenizer)
        write_table(prepared.pairs.pairs, new_pairs, PAIRS_SCHEMA)
        write_table(prepared.pairs.responses, new_responses, RESPONSES_SCHEMA)
        write_json(new_summary, prepared.summary, indent=2)
    return prepared.summary


def _prepare(params: PrepareParams, model: ModelParams, on_bad_row: str) -> _Prepared:
    template = read_template(params.chat_template)
    tokenizer = load_tokenizer(model) if model.scratch is None else None
    own_template = tokenizer is None or tokenizer.chat_template is not None
    chat = params.chat_template != "never" and (template is not None or own_template)
    inputs = read_inputs(params, chat=chat)
    if tokenizer is None:
        tokenizer = _trained(inputs, model, on_bad_row, params)
    if template is not None:
        tokenizer.chat_template = template

    encoder = Encoder(
        tokenizer, chat=chat, limits=Limits(params.max_tokens, params.max_prompt_tokens, params.long_prompts)
    )
    supervised = supervised_table(inputs.supervised, encoder)
    tables = pair_tables(inputs.preferences, inputs.test, encoder, params)
    # Chosen responses that serve as sft rows were reported with their pair already.
    sft_bad = [] if params.sft.source == "pairs" else supervised.bad
    bad = inputs.bad + sft_bad + tables.bad
    _judge(bad, on_bad_row, params)
    _need_rows(params, tables, supervised, bad)
    skipped = {"count": len(bad), "examples": [row._asdict() for row in bad[:KEPT_BAD_ROWS]]}
    noticed = notices(tables.pairs, tables.responses, tokenizer.all_special_tokens)
    tell(noticed, inputs.unused)
    counts = {**tables.counts, **supervised.counts, "vocabulary_size": len(tokenizer), "skipped_rows": skipped}
    counts |= noticed | {"unused_columns": inputs.unused}
    return _Prepared(supervised, tables, tokenizer, counts)


def _trained(inputs: Inputs, model: ModelParams, on_bad_row: str, params: PrepareParams) -> Any:
    assert model.scratch is not None
    if not inputs.supervised:
        _judge(inputs.bad, on_bad_row, params)  # the likelier cause
        raise RequestError(
            "model.scratch trains its tokenizer on the sft rows, and there are none; choose a prepare.sft.source "
            "(files, pairs or demo), or give model.name."
        )
    texts = (text for example in inputs.supervised for text in (readable(example.prompt), text_of(example.completion)))
    return train_tokenizer(texts, model.scratch.vocabulary_size)


def _judge(bad: list[BadRow], on_bad_row: str, params: PrepareParams) -> None:
    """Raise RequestError for bad rows, or with "skip" say so in one line on stderr."""
    if not bad:
        return
    rows = "1 bad row" if len(bad) == 1 else f"{len(bad)} bad rows"
    origin = params.input if params.source == "files" else params.hub.dataset if params.hub else "the demo"
    if on_bad_row == "skip":
        print(f"Warning: {origin}: skipped {rows}; the first is {bad[0].where}: {bad[0].reason}", file=sys.stderr)
        return
    lines = [f"{origin} has {rows}; nothing was written."]
    lines += [f"  {row.where}: {row.reason}" for row in bad[:SHOWN_BAD_ROWS]]
    lines += [f"  and {len(bad) - SHOWN_BAD_ROWS} more"] if len(bad) > SHOWN_BAD_ROWS else []
    lines += ["Correct the input, or leave such rows out: --on-bad-row skip (or prepare.on_bad_row: skip)."]
    raise RequestError("\n".join(lines))


def _need_rows(params: PrepareParams, tables: PairTables, supervised: SupervisedTable, bad: list[BadRow]) -> None:
    counts = tables.counts
    for side in ("train", "test"):
        given = side == "train" or (params.files and params.files.test_pairs) or (params.hub and params.hub.test_split)
        if given and counts["pairs"][side] == 0:
            raise RequestError(
                f"no usable {side} pair is left: {len(bad)} bad rows skipped, "
                f"{counts['dropped_pairs_prompt_too_long']} pairs with a prompt above prepare.max_prompt_tokens "
                f"({params.max_prompt_tokens}) dropped, {counts['train_prompts_also_in_test']} train prompts also in "
                f"test (prepare.test_share is {params.test_share})."
            )
    if params.sft.source != "none" and supervised.counts["sft_rows"] == 0:
        share = f"; prepare.sft.pairs_share ({params.sft.pairs_share}) selects prompts" * (params.sft.source == "pairs")
        raise RequestError(f"no usable sft row is left{share}; see prepare.sft and prepare.max_prompt_tokens.")
    if counts["pairs"]["test"] == 0:
        print(f"Warning: no test pair (prepare.test_share is {params.test_share}).", file=sys.stderr)


def _refuse_foreign_folder(tokenizer: Path) -> None:
    """The tokenizer's folder is replaced as a whole, so it must not be somebody's folder of other things."""
    if tokenizer.is_dir() and any(tokenizer.iterdir()) and not (tokenizer / "tokenizer_config.json").exists():
        raise RequestError(
            f"{tokenizer} holds files and no tokenizer; prepare would replace the whole folder. Name another folder "
            "with --tokenizer, or empty this one."
        )


@contextmanager
def _staged(outputs: Sequence[Path]) -> Iterator[list[Path]]:
    """Paths beside `outputs` to write to; when the block ends well each takes its output's place, else they vanish."""
    staged = [path.with_name(f".{path.name}.new") for path in outputs]
    try:
        for path in staged:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(path)  # of a run that was killed
        yield staged
        for new, path in zip(staged, outputs, strict=True):
            _replace(new, path)
    finally:
        for path in staged:
            _remove(path)


def _replace(new: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.old")
    _remove(old)
    if new.is_dir() and path.exists():
        os.replace(path, old)
    os.replace(new, path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
