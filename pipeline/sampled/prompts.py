"""What answers are sampled to: the train prompts of prepared pairs, or the prompts of files, each with its answer."""

from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl

from cache import prompt_key
from pipeline.data.counting import BadRows
from pipeline.data.inputs import Inputs
from pipeline.data.pairing import write_supervised
from pipeline.data.shards import encoder_for
from pipeline.data.tables import SFT_SCHEMA, TableWriter, read_pairs, read_responses, read_sft
from pipeline.engine.rows import token_arrays
from pipeline.errors import RequestError
from pipeline.model.tokenizer import open_tokenizer
from pipeline.params import PrepareParams, SampleParams
from pipeline.workspace import scratch_folder

COLUMNS = ["prompt_key", "prompt_ids", "prompt_text", "category", "reference"]


def prompts_to_sample(
    params: SampleParams, prepare: PrepareParams, *, pairs: Path, tokenizer: Path, trust_remote_code: bool = False
) -> pl.DataFrame:
    """Columns COLUMNS, one row a prompt, by key; reference: text of an answer known to be right, where there is one.

    No prompt of the prepared test pairs is among them. With params.prompts the smallest keys, which is a random sample.
    Raises RequestError for rows that can't be read, and where none is left.
    """
    found = _of_files(params, prepare, tokenizer, trust_remote_code) if params.files else _of_pairs(pairs)
    tests = read_pairs(pairs, "test")["prompt_key"].unique()
    kept = found.filter(~pl.col("prompt_key").is_in(tests.implode())).unique("prompt_key", maintain_order=True)
    kept = kept.sort("prompt_key").head(len(kept) if params.prompts is None else params.prompts)
    if kept.is_empty():
        raise RequestError(
            f"there is no prompt to sample answers to: {found['prompt_key'].n_unique()} were read, and without those "
            "of test pairs none is left. See sample.files, sample.prompts and prepare.test_share."
        )
    return kept.select(COLUMNS)


def _of_pairs(pairs: Path) -> pl.DataFrame:
    train = read_pairs(pairs, "train").unique("prompt_key", keep="first", maintain_order=True)
    ids = read_responses(pairs).unique("prompt_key").select("prompt_key", "prompt_ids")
    return train.select("prompt_key", "prompt_text", "category", pl.col("chosen_text").alias("reference")).join(
        ids, on="prompt_key", how="left"
    )


def _of_files(params: SampleParams, prepare: PrepareParams, tokenizer: Path, trust_remote_code: bool) -> pl.DataFrame:
    """By the rules of prepare's sft rows."""
    sft = prepare.sft.model_copy(update={"source": "files", "files": params.files})
    rows = prepare.model_copy(update={"sft": sft})
    opened = open_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    chat = prepare.chat_template != "never" and opened.chat_template is not None
    encoder, bad = encoder_for(rows, opened, chat=chat, words=False), BadRows()
    with TemporaryDirectory(dir=scratch_folder()) as folder:
        file = Path(folder) / "prompts.parquet"
        with TableWriter(file, SFT_SCHEMA) as writer:
            write_supervised(Inputs(rows, chat=chat).supervised(), encoder, writer, bad)
        table = read_sft(file)
    if bad.count and prepare.on_bad_row == "fail":
        lines = "\n".join(f"  {row.where}: {row.reason}" for row in bad.first[:10])
        raise RequestError(
            f"sample.files have {bad.count} bad rows; expected are a prompt and a completion, the answer known to be "
            f"right. Nothing was sampled. Mend them, name the columns by prepare.columns, or set prepare.on_bad_row: "
            f"skip:\n{lines}"
        )
    keys = [prompt_key(ids) for ids in token_arrays(table["prompt_ids"])]
    return table.select("prompt_ids", "prompt_text", pl.col("response_text").alias("reference")).with_columns(
        pl.Series("prompt_key", keys, dtype=pl.Binary), pl.lit(None, pl.String).alias("category")
    )
