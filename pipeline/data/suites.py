"""Preference suites: further sets of pairs that policies are judged by and never trained on.

SUITES/index.json           the suites' names
SUITES/NAME/                pairs.parquet and responses.parquet as of any pairs, and summary.json
SUITES/NAME/rows.parquet    one row per input row that made pairs, in input order: where it stands, and its own id
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from pipeline.data.inputs import Inputs
from pipeline.data.prepare import prepare_data, staged_outputs
from pipeline.data.tables import TableWriter, read_pairs
from pipeline.errors import RequestError
from pipeline.files import write_json
from pipeline.params import ModelParams, PrepareParams, SuiteParams
from pipeline.params.suites import TIES_ID

INDEX = "index.json"
_BATCH = 10_000

SUITE_ROWS_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),  # as in pairs.parquet
        pa.field("id", pa.string()),  # the row's own column `id`, where it has one
    ]
)


def prepare_suites(
    suites: Mapping[str, SuiteParams],
    *,
    prepare: PrepareParams,
    folder: str,
    tokenizer: Path,
    out: Path,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Make `out` hold exactly these suites; returns their summaries by name.

    prepare: the section, whose limits and kind of prompt hold where a suite has none of its own; folder: of the files,
    evaluate.suites_input; tokenizer: from prepare, with its chat template. Raises RequestError, which names the suite,
    for wrong input, with `out` as it was.
    """
    _refuse_foreign_folder(out)
    if not suites:
        _write_none(out)
        return {}
    if not tokenizer.is_dir():
        raise RequestError(
            f"{tokenizer} does not exist; it is written by `refcache prepare` (run `dvc repro prepare`)."
        )
    done = {}
    with staged_outputs([out]) as (staged,):
        for name, suite in suites.items():
            print(f"suites: {name}", file=sys.stderr, flush=True)
            model = ModelParams(name=str(tokenizer), trust_remote_code=trust_remote_code)
            try:
                done[name] = _prepare_suite(suite.prepare_params(prepare, folder), model, staged / name)
                if suite.ties:
                    _need_ties(staged / name, name)
            except RequestError as error:
                reason = suite.in_these_words(str(error), name)
                raise RequestError(f"Suite {name}: {reason}\n{out} is as it was.") from None
        write_json(staged / INDEX, list(suites))
    return done


def _prepare_suite(params: PrepareParams, model: ModelParams, to: Path) -> dict[str, Any]:
    unused = to / ".unused"  # what a suite has none of: sft rows, and a tokenizer of its own
    summary = prepare_data(
        params,
        model,
        sft=unused / "sft.parquet",
        tokenizer=unused / "tokenizer",
        pairs=to,
        summary=to / "summary.json",
        a_suite=True,
    )
    if labelled := summary["feedback"]["train"]:
        raise RequestError(
            f"{labelled:,} rows are single responses with a label (form unpaired), expected pairs. Nothing compares "
            "such responses; leave them out, or pair them."
        )
    shutil.rmtree(unused)
    _write_rows(Inputs(params, chat=True), to)
    return summary


def _need_ties(folder: Path, name: str) -> None:
    ids = [found for found in read_suite_rows(folder)["id"].drop_nulls() if TIES_ID.fullmatch(found)]
    kinds = {found.partition(":")[0] for found in ids}
    if len(kinds) < 2:
        raise RequestError(
            f"evaluate.suites.{name}.ties is true, but its rows have {len(ids)} ids of the form ref:N and tied:N in "
            "their column id, expected some of either (as the subset Ties of RewardBench 2 has them). Set ties: false."
        )


def _write_rows(inputs: Inputs, to: Path) -> None:
    """rows.parquet of the rows that made pairs. How prompts are rendered does not matter to where a row stands."""
    used = set(read_pairs(to)["source"])
    with TableWriter(to / "rows.parquet", SUITE_ROWS_SCHEMA) as writer:
        waiting: list[tuple[str, str | None]] = []
        for row in inputs.ids():
            waiting += [row] if row[0] in used else []
            if len(waiting) == _BATCH:
                writer.write(_rows_table(waiting))
                waiting = []
        writer.write(_rows_table(waiting))


def _rows_table(rows: list[tuple[str, str | None]]) -> pa.Table:
    columns = [[row[place] for row in rows] for place in range(2)]
    return pa.table([pa.array(column, pa.string()) for column in columns], schema=SUITE_ROWS_SCHEMA)


def suite_folders(suites: Path) -> dict[str, Path]:
    """The prepared suites in `suites` by name. Raises RequestError where `prepare_suites` wrote none of it."""
    index = suites / INDEX
    if not index.is_file():
        raise RequestError(f"{index} does not exist; it is written by `refcache suites` (run `dvc repro suites`).")
    return {name: suites / name for name in json.loads(index.read_text(encoding="utf-8"))}


def read_suite_rows(folder: Path) -> pl.DataFrame:
    """Columns source and id of one suite. Raises RequestError where they are absent."""
    file = folder / "rows.parquet"
    if not file.is_file():
        raise RequestError(f"{file} does not exist; it is written by `refcache suites` (run `dvc repro -f suites`).")
    return pl.read_parquet(file, glob=False)


def _write_none(out: Path) -> None:
    """The index first: what a kill leaves is then nobody's, and goes with the next run."""
    write_json(out / INDEX, [])
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def _refuse_foreign_folder(out: Path) -> None:
    """The folder is replaced as a whole, so it must not be somebody's folder of other things."""
    if out.is_dir() and any(out.iterdir()) and not (out / INDEX).exists():
        raise RequestError(
            f"{out} holds files and no {INDEX}; `suites` would replace the whole folder. Name another folder with "
            "--out, or empty this one."
        )
