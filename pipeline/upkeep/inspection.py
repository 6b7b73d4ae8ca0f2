"""What a reference cache holds, computed in a few streaming passes: the numbers behind `refcache inspect`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from cache import Reference, StoredRows, open_reference, open_sketches
from cache.opening import published_kind
from cache.sketches import SKETCHES
from pipeline.errors import RequestError
from pipeline.reference import drift
from pipeline.workspace import remote_copies_folder

QUANTILES = {"p01": 0.01, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}
BINS_PER_NAT = 1000  # token log-probs are counted in bins, so that memory does not grow with the number of tokens

Decode = Callable[[list[int]], str]


def inspect_reference(
    path: Path, *, tokenizer: Path | None, extremes: int, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Identity, size, distributions (nats) and extreme rows of the reference cache `path`, ready for JSON.

    path: a folder, or an address in object storage, whose shards are fetched to .refcache/remote.
    tokenizer: folder to decode the extreme rows with, or None for no text; extremes: rows at each end of each order.
    Of sketches: groups and norms of gradients instead of tokens and log-probs, and never text. Raises as
    `cache.open_reference`, and RequestError when `tokenizer` holds no tokenizer.
    """
    if published_kind(path) == SKETCHES:
        return _inspect_sketches(path, extremes)
    reference = open_reference(path, expect=None, copies=remote_copies_folder())
    decode = None if tokenizer is None else load_decoder(tokenizer, trust_remote_code=trust_remote_code)
    return {
        **_facts(reference),
        "tokens": reference.n_tokens,
        "n_tokens": _distribution(reference, "n_tokens"),
        "sum_logp": _distribution(reference, "sum_logp"),
        "token_logp": _token_distribution(reference),
        "extremes": _extremes(reference, extremes, decode),
        "drift": _read_drift(reference, extremes),
    }


def _inspect_sketches(path: Path, extremes: int) -> dict[str, Any]:
    sketches = open_sketches(path, expect=None, copies=remote_copies_folder())
    return {
        **_facts(sketches),
        "groups": sketches.identity.widths,
        "grad_norm": _distribution(sketches, "grad_norm"),
        "extremes": {
            name: frame.with_columns(pl.col("response_key").bin.encode("hex")).to_dicts()
            for name, frame in _ends(sketches.scan().select("response_key", "grad_norm"), "grad_norm", extremes)
        },
    }


def _facts(stored: StoredRows) -> dict[str, Any]:
    return {
        "path": str(stored.place),
        "kind": stored.manifest.kind,
        "format_version": stored.manifest.format_version,
        "reference_id": stored.manifest.reference_id,
        "identity": stored.identity.to_dict(),
        "rows": stored.n_rows,
        "shards": [{"file": s.file, "rows": s.rows, "bytes": s.bytes} for s in stored.manifest.shards],
    }


def _distribution(reference: StoredRows, column: str) -> dict[str, float] | None:
    """Exact mean, extremes and quantiles of a column with one number per row; None without rows."""
    if reference.n_rows == 0:
        return None
    values = pl.col(column).cast(pl.Float64)
    quantiles = [values.quantile(q, "nearest").alias(name) for name, q in QUANTILES.items()]
    summary = [values.mean().alias("mean"), values.min().alias("min"), *quantiles, values.max().alias("max")]
    return reference.scan().select(summary).collect(engine="streaming").row(0, named=True)


def _token_distribution(reference: Reference) -> dict[str, float] | None:
    """As `_distribution`, over all response tokens; quantiles are exact to a bin, 1 / BINS_PER_NAT nats."""
    if reference.n_rows == 0:
        return None
    tokens = reference.scan().select(pl.col("token_logps").alias("logp")).explode("logp").cast(pl.Float64)
    bins = (
        tokens.group_by((pl.col("logp") * BINS_PER_NAT).round().cast(pl.Int64).alias("bin"))
        .agg(pl.len().alias("count"), pl.col("logp").sum().alias("sum"), pl.min("logp").alias("min"), pl.max("logp"))
        .sort("bin")
        .collect(engine="streaming")
    )
    total = int(bins["count"].sum())
    reached = bins["count"].cum_sum()
    quantiles = {
        name: int(bins["bin"][int((reached < q * total).sum())]) / BINS_PER_NAT for name, q in QUANTILES.items()
    }
    ends = {"mean": float(bins["sum"].sum()) / total, "min": float(bins["min"][0])}
    return ends | quantiles | {"max": float(bins["logp"][-1])}


def _extremes(reference: Reference, count: int, decode: Decode | None) -> dict[str, list[dict[str, Any]]]:
    """The rows at both ends of the mean and of the summed log-prob, most extreme first."""
    rows = reference.scan().select(
        "response_key", "n_tokens", "sum_logp", (pl.col("sum_logp") / pl.col("n_tokens")).alias("mean_logp")
    )
    return {
        name: _with_text(reference, frame, decode)
        for order in ("mean_logp", "sum_logp")
        for name, frame in _ends(rows, order, count)
    }


def _ends(rows: pl.LazyFrame, order: str, count: int) -> Iterator[tuple[str, pl.DataFrame]]:
    """("lowest_ORDER", frame) and ("highest_ORDER", frame), most extreme first."""
    # The key breaks ties, or the same cache could show other rows each time.
    ends = {"lowest": rows.bottom_k(count, by=[order, "response_key"])}
    ends["highest"] = rows.top_k(count, by=[order, "response_key"])
    for end, query in ends.items():
        frame = query.collect(engine="streaming").sort(order, "response_key", descending=end == "highest")
        yield f"{end}_{order}", frame


def _with_text(reference: Reference, frame: pl.DataFrame, decode: Decode | None) -> list[dict[str, Any]]:
    token_ids = reference.rows(frame["response_key"], ["token_ids"])["token_ids"]
    texts = [None if decode is None else decode(ids) for ids in token_ids.to_list()]
    rows = frame.with_columns(pl.col("response_key").bin.encode("hex")).to_dicts()
    return [row | {"text": text} for row, text in zip(rows, texts, strict=True)]


def load_decoder(folder: Path, *, trust_remote_code: bool = False) -> Decode:
    """Token ids to text, special tokens included, with the tokenizer in `folder`; RequestError when there is none."""
    fast = folder / "tokenizer.json"
    if fast.is_file():
        from tokenizers import Tokenizer  # a second faster to load than transformers

        tokenizer = Tokenizer.from_file(str(fast))
        return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))
    if not (folder / "tokenizer_config.json").is_file():
        raise RequestError(f"{folder} holds no tokenizer: neither tokenizer.json nor tokenizer_config.json.")
    from pipeline.model.tokenizer import open_tokenizer

    slow = open_tokenizer(folder, trust_remote_code=trust_remote_code)
    return lambda ids: str(slow.decode(ids, skip_special_tokens=False))


def _read_drift(reference: Reference, extremes: int) -> dict[str, Any] | None:
    """drift.json, of its sampled rows only the `extremes` that drift most."""
    if reference.remote is not None:
        reference.remote.fetch_companion(drift.FILE, reference.path)
    content = drift.read_drift(reference.path)
    if content is None:
        return None
    return drift.summary(content) | {"worst": content.get("sequences", [])[:extremes]}
