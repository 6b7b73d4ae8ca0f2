"""What each form of export consists of: from the joined table of pairs to the files of one split."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.data.tables import KEY, TOKENS, TableWriter
from pipeline.export import pairs as joined
from pipeline.export.texts import Texts, check_every

TRL_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("chosen", pa.string(), nullable=False),
        pa.field("rejected", pa.string(), nullable=False),
        pa.field("prompt_ids", TOKENS, nullable=False),
        pa.field("chosen_ids", TOKENS, nullable=False),
        pa.field("rejected_ids", TOKENS, nullable=False),
        pa.field("ref_chosen_logps", pa.float64()),
        pa.field("ref_rejected_logps", pa.float64()),
        pa.field("chosen_key_hex", pa.string(), nullable=False),
        pa.field("rejected_key_hex", pa.string(), nullable=False),
    ]
)


class Part(NamedTuple):
    """One split on its way into `folder`."""

    folder: Path
    split: str
    n_pairs: int
    tables: Iterator[pa.Table]  # of pipeline.export.pairs.SCHEMA
    texts: Texts | None  # where the form renders texts
    hash: str | None  # open-instruct's name for the file


class Form(NamedTuple):
    write: Callable[[Part], None]
    has_nulls: bool = True  # can hold a pair without log-probs
    renders: bool = False  # needs the tokenizer


def write_parquet(part: Part) -> None:
    with TableWriter(part.folder / f"{part.split}.parquet", joined.SCHEMA) as writer:
        for table in part.tables:
            writer.write(table)


def write_jsonl(part: Part) -> None:
    names = [field.name for field in joined.SCHEMA if field.type != KEY]  # JSON has no bytes; the hex text stays
    with open(part.folder / f"{part.split}.jsonl", "xb") as file:
        for table in part.tables:
            pl.DataFrame(table.select(names)).write_ndjson(file)


def write_trl(part: Part) -> None:
    assert part.texts is not None
    with TableWriter(part.folder / f"{part.split}.parquet", TRL_SCHEMA) as writer:
        for table in part.tables:
            rendered = part.texts.render(table)
            part.texts.check(table, rendered, check_every(part.n_pairs))
            columns = dict(zip(table.column_names, table.columns, strict=True)) | {
                "prompt": rendered.prompts,
                "chosen": rendered.chosen,
                "rejected": rendered.rejected,
                "ref_chosen_logps": table["chosen_sum_logp"],
                "ref_rejected_logps": table["rejected_sum_logp"],
            }
            writer.write(pa.table({name: columns[name] for name in TRL_SCHEMA.names}))


def write_fairseq2(part: Part) -> None:
    assert part.texts is not None
    with open(part.folder / f"{part.split}.jsonl", "xb") as file:
        for table in part.tables:
            rendered = part.texts.render(table)
            part.texts.check(table, rendered, check_every(part.n_pairs))
            rows = {
                "id": table["pair_id"],
                "src": rendered.prompts,
                # Its encoder ends a target with the end-of-sequence token itself.
                "tgt_chosen": list(map(part.texts.without_end, rendered.chosen)),
                "tgt_rejected": list(map(part.texts.without_end, rendered.rejected)),
                "reference_score_chosen": table["chosen_sum_logp"],
                "reference_score_rejected": table["rejected_sum_logp"],
            }
            pl.DataFrame(pa.table(rows)).write_ndjson(file)


def write_open_instruct(part: Part) -> None:
    """The tensors, 8 bytes a pair in memory, and the rows that they belong to in the same order."""
    assert part.texts is not None
    sums: dict[str, list[Any]] = {"chosen_logps": [], "rejected_logps": []}
    with open(part.folder / f"{part.split}.jsonl", "x", encoding="utf-8") as file:
        for table in part.tables:
            for name, column in zip(sums, ("chosen_sum_logp", "rejected_sum_logp"), strict=True):
                sums[name].append(table[column].to_numpy().astype(np.float32))
            rows = table.select(["pair_id", "source", "prompt", "chosen", "rejected"]).to_pylist()
            for row in rows:
                turns = messages(row.pop("prompt"))
                for side in ("chosen", "rejected"):
                    row[side] = [*turns, {"role": "assistant", "content": row[side]}]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            part.texts.check_dialogues(table, rows, check_every(part.n_pairs))
    import torch

    empty = np.empty(0, np.float32)
    tensors = {name: torch.from_numpy(np.concatenate([empty, *columns])) for name, columns in sums.items()}
    torch.save(tensors, part.folder / f"{part.hash}.pt")


_HEAD = re.compile(r"(?:\A|\n\n)\[(system|user|assistant)\] ")


def messages(prompt: str) -> list[dict[str, str]]:
    """The turns of a prompt's readable text, which heads them with their roles where it has more than one."""
    heads = list(_HEAD.finditer(prompt))
    if not heads or heads[0].start() != 0:
        return [{"role": "user", "content": prompt}]
    ends = [head.start() for head in heads[1:]] + [len(prompt)]
    return [{"role": head[1], "content": prompt[head.end() : end]} for head, end in zip(heads, ends, strict=True)]


FORMS = {
    "parquet": Form(write_parquet),
    "jsonl": Form(write_jsonl),
    "trl": Form(write_trl, renders=True),
    "open-instruct": Form(write_open_instruct, has_nulls=False, renders=True),
    "fairseq2": Form(write_fairseq2, has_nulls=False, renders=True),
}
