"""The prepare stage: rows -> sft rows, tokenizer, pairs and distinct responses, and a summary of what was left out.

Three separate outputs on purpose: sft rows and tokenizer decide the reference model, so pairs may be added without
touching either, and every cached reference value stays valid.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.data.counting import BadRows, PairCounts, Tally
from pipeline.data.inputs import Inputs
from pipeline.data.notices import Notices, tell
from pipeline.data.pairing import write_supervised
from pipeline.data.preferences import SupervisedExample
from pipeline.data.shards import Shard, elsewhere, encode_here, encoder_for, ranges, usable_processes
from pipeline.data.spool import Spooled, partitions_for
from pipeline.data.tables import FEEDBACK_SCHEMA, PAIRS_SCHEMA, RESPONSES_SCHEMA, SFT_SCHEMA, TableWriter
from pipeline.encoding.dialogues import readable, text_of
from pipeline.encoding.encoder import Encoder
from pipeline.encoding.words import WordsDisagree
from pipeline.errors import RequestError
from pipeline.files import write_json
from pipeline.model.tokenizer import load_tokenizer, read_template, train_tokenizer
from pipeline.params import ModelParams, PrepareParams
from pipeline.progress import progress_bar
from pipeline.published.files import BadRow

SHOWN_BAD_ROWS = 10  # in an error


class _Outputs(NamedTuple):
    sft: Path
    tokenizer: Path
    pairs: Path
    responses: Path
    feedback: Path
    summary: Path


def prepare_data(
    params: PrepareParams,
    model: ModelParams,
    *,
    sft: Path,
    tokenizer: Path,
    pairs: Path,
    summary: Path,
    on_bad_row: str | None = None,
    a_suite: bool = False,
) -> dict[str, Any]:
    """Write the four outputs and return the summary.

    on_bad_row: "fail" or "skip", instead of params.on_bad_row. a_suite: nothing trains on these pairs, so that a test
    side is not missed.

    Raises RequestError for wrong input, with nothing written and earlier outputs untouched. Memory does not grow with
    the rows, but by some 150 bytes a pair.
    """
    _refuse_foreign_folder(tokenizer)
    table, responses, feedback = (pairs / f"{name}.parquet" for name in ("pairs", "responses", "feedback"))
    with (
        staged_outputs(_Outputs(sft, tokenizer, table, responses, feedback, summary)) as staged,
        _spool_folder(summary) as spool,
    ):
        done = _prepare(params, model, on_bad_row or params.on_bad_row, _Outputs(*staged), spool)
        if not a_suite and done["pairs"]["test"] == done["feedback"]["test"] == 0:
            print(f"Warning: no test pair (prepare.test_share is {params.test_share}).", file=sys.stderr)
        return done


def _prepare(
    params: PrepareParams, model: ModelParams, on_bad_row: str, to: _Outputs, spool_folder: Path
) -> dict[str, Any]:
    template = read_template(params.chat_template)
    tokenizer = load_tokenizer(model) if model.scratch is None else None
    own_template = tokenizer is None or tokenizer.chat_template is not None
    chat = params.chat_template != "never" and (template is not None or own_template)
    inputs = Inputs(params, chat=chat)
    if tokenizer is None:
        tokenizer = _trained(inputs, model, on_bad_row, params)
    if template is not None:
        tokenizer.chat_template = template

    tokenizer.save_pretrained(to.tokenizer)

    for words in (True, False):
        encoder = encoder_for(params, tokenizer, chat=chat, words=words)
        try:
            shards = _shards(params, model, to.tokenizer, spool_folder / str(words), inputs.rows(), chat, words)
            tally = _encode(inputs, encoder, params, shards)
            bad = tally.bad
            with TableWriter(to.sft, SFT_SCHEMA) as writer:
                # Chosen responses that serve as sft rows are reported with their pair already.
                sft_bad = BadRows() if params.sft.source == "pairs" else bad
                supervised = write_supervised(inputs.supervised(), encoder, writer, sft_bad)
            break
        except WordsDisagree as error:
            print(
                f"prepare: again, without encoding/words.py, whose ids are not the tokenizer's: {error}",
                file=sys.stderr,
            )
    _judge(bad, on_bad_row, params)
    spooled = Spooled([Path(shard.folder) for shard in shards], shards[0].partitions)
    counts, noticed = PairCounts(spooled.kept, tally.long), Notices(encoder.special_tokens if chat else [])
    noticed.add_keys(spooled.kept.keys)
    _write_pairs(spooled, to, [counts, noticed])
    _need_rows(params, counts.counts(), supervised, bad)
    skipped = {"count": bad.count, "examples": [row._asdict() for row in bad.first]}
    summary = {**counts.counts(), **supervised, "vocabulary_size": len(tokenizer), "skipped_rows": skipped}
    summary |= noticed.counts | {"unused_columns": sorted((tally.seen - tally.used) | inputs.sft_unused)}
    summary |= {"forms": dict(tally.forms), "dropped_ties": tally.ties}
    summary |= {"fields_not_rendered": dict(sorted(tally.unrendered.items()))}
    summary |= {"feedback_without_other_prompts": tally.within}
    tell(summary)
    write_json(to.summary, summary, indent=2)
    return summary


def _shards(
    params: PrepareParams, model: ModelParams, tokenizer: Path, folder: Path, rows: int, chat: bool, words: bool
) -> list[Shard]:
    """As many as there are cores, and fewer of few rows."""
    return [
        Shard(
            params=params.model_dump(),
            tokenizer=str(tokenizer),
            trust_remote_code=model.trust_remote_code,
            chat=chat,
            words=words,
            folder=str(folder / str(place)),
            partitions=partitions_for(rows),
            first=first,
            last=last,
        )
        for place, (first, last) in enumerate(ranges(rows, usable_processes()))
    ]


def _encode(inputs: Inputs, encoder: Encoder, params: PrepareParams, shards: list[Shard]) -> Tally:
    """All rows into spools: the first shard by this process, the others by their own."""
    with elsewhere(shards[1:]) as processes, progress_bar("prepare pairs", inputs.rows()) as advance:
        # The others are about as far.
        tally = encode_here(inputs, encoder, params, shards[0], lambda done, _=0: advance(done * len(shards)))
        for process in processes:
            tally.add(process.tally())
    return tally


def _write_pairs(spooled: Spooled, to: _Outputs, counters: Sequence[PairCounts | Notices]) -> None:
    def write_pairs() -> None:
        with TableWriter(to.pairs, PAIRS_SCHEMA) as writer:
            for table in spooled.pairs():
                writer.write(table)
                for counter in counters:
                    counter.add_pairs(table)
        if spooled.kept.feedback.any():
            with TableWriter(to.feedback, FEEDBACK_SCHEMA) as writer:
                for table in spooled.feedback():
                    writer.write(table)

    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write_pairs)
        with TableWriter(to.responses, RESPONSES_SCHEMA) as writer:
            for table in _ahead(spooled.responses()):
                writer.write(table)
                for counter in counters:
                    counter.add_responses(table)
        written.result()


def _ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same tables, the next one read while the last one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = pool.submit(next, tables, None)
            yield table


def _trained(inputs: Inputs, model: ModelParams, on_bad_row: str, params: PrepareParams) -> Any:
    assert model.scratch is not None
    good = (row for row in inputs.supervised() if isinstance(row, SupervisedExample))
    first = next(good, None)
    if first is None:
        bad = BadRows()
        pairs = (part for row in inputs.preferences() for part, _ in row)
        for row in chain(pairs, inputs.supervised()):
            if isinstance(row, BadRow):
                bad.add(row)
        _judge(bad, on_bad_row, params)  # the likelier cause
        raise RequestError(
            "model.scratch trains its tokenizer on the sft rows, and there are none; choose a prepare.sft.source "
            "(files, pairs or demo), or give model.name."
        )
    examples = chain([first], good)
    texts = (text for example in examples for text in (readable(example.prompt), text_of(example.completion)))
    return train_tokenizer(texts, model.scratch.vocabulary_size)


def _judge(bad: BadRows, on_bad_row: str, params: PrepareParams) -> None:
    """Raise RequestError for bad rows, or with "skip" say so in one line on stderr."""
    if not bad.count:
        return
    rows = "1 bad row" if bad.count == 1 else f"{bad.count} bad rows"
    origin = params.input if params.source == "files" else params.hub.dataset if params.hub else "the demo"
    if on_bad_row == "skip":
        first = bad.first[0]
        print(f"Warning: {origin}: skipped {rows}; the first is {first.where}: {first.reason}", file=sys.stderr)
        return
    lines = [f"{origin} has {rows}; nothing was written."]
    reasons = [row.reason for row in bad.first]
    for row, before in zip(bad.first[:SHOWN_BAD_ROWS], [None, *reasons], strict=False):
        lines.append(f"  {row.where}: {'the same' if row.reason == before else row.reason}")
    lines += [f"  and {bad.count - SHOWN_BAD_ROWS} more"] if bad.count > SHOWN_BAD_ROWS else []
    lines += ["Correct the input, or leave such rows out: --on-bad-row skip (or prepare.on_bad_row: skip)."]
    raise RequestError("\n".join(lines))


def _need_rows(params: PrepareParams, counts: dict[str, Any], supervised: dict[str, Any], bad: BadRows) -> None:
    for side in ("train", "test"):
        given = side == "train" or (params.files and params.files.test_pairs) or (params.hub and params.hub.test_split)
        if given and counts["pairs"][side] == counts["feedback"][side] == 0:
            raise RequestError(
                f"no usable {side} pair is left: {bad.count} bad rows skipped, "
                f"{counts['dropped_pairs_prompt_too_long']} pairs with a prompt above prepare.max_prompt_tokens "
                f"({params.max_prompt_tokens}) dropped, {counts['train_prompts_also_in_test']} train prompts also in "
                f"test (prepare.test_share is {params.test_share})."
            )
    if params.sft.source != "none" and supervised["sft_rows"] == 0:
        share = f"; prepare.sft.pairs_share ({params.sft.pairs_share}) selects prompts" * (params.sft.source == "pairs")
        raise RequestError(f"no usable sft row is left{share}; see prepare.sft and prepare.max_prompt_tokens.")


@contextmanager
def _spool_folder(summary: Path) -> Iterator[Path]:
    """A folder beside the summary that is gone when the block ends; of a run that was killed, when the next begins."""
    folder = summary.with_name(f".{summary.name}.spool")
    _remove(folder)
    try:
        yield folder
    finally:
        _remove(folder)


def _refuse_foreign_folder(tokenizer: Path) -> None:
    """The tokenizer's folder is replaced as a whole, so it must not be somebody's folder of other things."""
    if tokenizer.is_dir() and any(tokenizer.iterdir()) and not (tokenizer / "tokenizer_config.json").exists():
        raise RequestError(
            f"{tokenizer} holds files and no tokenizer; prepare would replace the whole folder. Name another folder "
            "with --tokenizer, or empty this one."
        )


@contextmanager
def staged_outputs(outputs: Sequence[Path]) -> Iterator[list[Path]]:
    """Paths beside `outputs` to write to; when the block ends well each takes its output's place, else they vanish.

    An output that was not written is removed.
    """
    staged = [path.with_name(f".{path.name}.new") for path in outputs]
    made = [folder for path in outputs for folder in [path.parent, *path.parent.parents] if not folder.exists()]
    try:
        for path in staged:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(path)  # of a run that was killed
        yield staged
        for new, path in zip(staged, outputs, strict=True):
            if new.exists():
                _replace(new, path)
            else:  # what this run has none of
                _remove(path)
    finally:
        for path in staged:
            _remove(path)
        for folder in sorted(set(made), reverse=True):
            with suppress(OSError):  # it holds an output
                folder.rmdir()


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
