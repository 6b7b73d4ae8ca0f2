"""What trained offsets leave of A delta: by the sketch they were fitted to, by the audit and, on request, in truth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from pydantic import TypeAdapter
from torch import Tensor

from cache import locate
from cache.key_set import KeyArray, key_array
from pipeline.auxdpo.nullspace import exact_penalty
from pipeline.auxdpo.offsets import TABLE_SCHEMA, Offsets
from pipeline.auxdpo.rank_share import open_offsets, require_adapter
from pipeline.auxdpo.requirements import open_fitting
from pipeline.data.tables import PAIR_SIDES, scan_pairs, scan_responses
from pipeline.errors import RequestError
from pipeline.forward.logps import ResponseLogps, Tokens
from pipeline.model.digests import config_digest, weights_digest
from pipeline.model.opening import open_model
from pipeline.model.parts import disable_dropout
from pipeline.params import AuxDPO, Trainable
from pipeline.progress import activity, progress_bar
from pipeline.trainable.selection import select_trainable

BATCH_TOKENS = 4096  # of prompts and responses in one backward, padding included
WEIGHTS = ("null_weight", "null_weight_absolute")  # in effect where a penalty held the offsets, else as given
SAME = 0.01  # relative difference from what training recorded that sketches, pairs and offsets of that run can have


class _OneRank:
    rank, ranks, device = 0, 1, torch.device("cpu")

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values


def report_offsets(
    sketches: Path,
    offsets: Path,
    *,
    trained: Path,
    pairs: Path,
    model: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The penalty ||sum_j w_j delta_j g_j||^2 of trained offsets, weighted and centred as their training did.

    offsets: the policy's offsets.parquet; trained: the train.json of that run; pairs: what it trained on. model: the
    reference, for the true value in float32 by one epoch of ordinary backward passes; None: without it. Raises
    RequestError where these files don't belong together, CacheIncomplete for responses without a sketch, CacheMismatch
    for sketches of another model or `trainable` than that of the run.
    """
    record = _read_record(trained)
    params = AuxDPO.from_record(record["hyperparameters"])
    found = _load(sketches, offsets, pairs, params)
    summary = found.summary()
    names = ("responses", "rms", "penalty", "penalty_audit", "null_ratio")
    content = {
        "path": str(offsets),
        **{name: getattr(params, name) for name in ("constraint", "weights", "centred", *WEIGHTS)},
        **({name: summary[name] for name in WEIGHTS} if params.constraint == "penalty" else {}),
        **{name: summary[name] for name in names},
        "penalty_recorded": record.get("offsets", {}).get("penalty"),
        "penalty_exact": None,
    }
    if model is not None:
        trainable = TypeAdapter(Trainable).validate_python(record["trainable"])
        content["penalty_exact"] = _true_penalty(
            found, sketches, model, trainable, pairs, trust_remote_code=trust_remote_code
        )
    return content | {"warnings": list(_warnings(content, trained))}


def _read_record(trained: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(trained.read_text())
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{trained} can't be read ({error}). Name the train.json of the run that made the offsets with --trained: "
            "it says how they were weighted and centred."
        ) from None
    if record.get("objective") != "auxdpo":
        raise RequestError(f"{trained} is of a run of {record.get('objective')}; only auxdpo has offsets.")
    return record


def _load(sketches: Path, offsets: Path, pairs: Path, params: AuxDPO) -> Offsets:
    sides = scan_pairs(pairs).filter(pl.col("split") == "train").select(*PAIR_SIDES, "prompt_key").collect()
    groups = np.unique(key_array(sides["prompt_key"]), return_inverse=True)[1]
    # As under `penalty`, whatever held them while they trained: what is left of A delta is asked for.
    found = open_offsets(sketches, sides, groups, params.model_copy(update={"constraint": "penalty"}), _OneRank())
    try:
        table = pl.read_parquet(offsets)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RequestError(f"{offsets} can't be read as offsets: {error}") from None
    if table.columns != TABLE_SCHEMA.names:
        raise RequestError(f"{offsets} has columns {table.columns}, expected {TABLE_SCHEMA.names}.")
    where = locate(found.keys, key_array(table["response_key"]))
    if len(table) != len(found.keys) or (where < 0).any():
        raise RequestError(
            f"{offsets} has offsets of {len(table):,} responses, but the training pairs of {pairs} have "
            f"{len(found.keys):,}, of which {int((where < 0).sum()):,} are not among them. Name the pairs that the run "
            "trained on with --pairs."
        )
    found.values.copy_(torch.from_numpy(table["offset"].to_numpy()[where]))
    return found


def _true_penalty(
    found: Offsets, sketches: Path, folder: Path, trainable: Trainable, pairs: Path, *, trust_remote_code: bool
) -> float:
    with activity(f"loading {folder}"):
        digests = {"weights": weights_digest(folder), "config": config_digest(folder)}
        open_fitting(sketches, **digests, trainable=trainable)
        start = open_model(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
        model = disable_dropout(select_trainable(start, trainable)).eval()
        require_adapter(sketches, model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sequences, coefficients = _longest_first(_sequences(pairs, found.keys), found.coefficients())
    longest = sum(map(len, sequences[0]))
    tokens = sum(len(prompt) + len(response) for prompt, response in sequences)
    with progress_bar("gradients", len(sequences), tokens=tokens) as advance:
        batch_size = max(1, BATCH_TOKENS // longest)
        return exact_penalty(ResponseLogps(model.to(device), None), sequences, coefficients, batch_size, advance)


def _sequences(pairs: Path, keys: KeyArray) -> list[tuple[Tokens, Tokens]]:
    """(prompt ids, response ids) of these responses, in their order."""
    rows = scan_responses(pairs).select("response_key", "prompt_ids", "response_ids").collect()
    where = locate(key_array(rows["response_key"]), keys)
    kept = rows.with_columns(pl.Series("_place", where)).filter(pl.col("_place") >= 0).sort("_place")
    return list(kept.select("prompt_ids", "response_ids").iter_rows())


def _longest_first(
    sequences: list[tuple[Tokens, Tokens]], coefficients: Tensor
) -> tuple[list[tuple[Tokens, Tokens]], Tensor]:
    """In batches of like lengths, the largest at once, so that memory is known to suffice."""
    order = sorted(range(len(sequences)), key=lambda index: -sum(map(len, sequences[index])))
    return [sequences[index] for index in order], coefficients[torch.tensor(order)]


def _warnings(content: dict[str, Any], trained: Path) -> list[str]:
    recorded, found = content["penalty_recorded"], content["penalty"]
    if recorded is None or abs(found - recorded) <= SAME * abs(recorded):
        return []
    return [
        f"{trained} recorded a penalty of {recorded:.4g} by the sketch, but these offsets have {found:.4g}. Offsets, "
        "pairs or sketches are not those of that run."
    ]
