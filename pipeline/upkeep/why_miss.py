"""Why the next `score` or `sketch` reuses its rows, or does not: which identity field differs, which rows are new."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl

from cache import CacheCorrupt, CacheError, CacheIncomplete, KeySet, StoredRows
from cache.garbage import find_journals, journalled_key_tables
from cache.identity import Identity, recorded_identity, short_digest
from cache.key_set import key_array
from cache.manifest import read_manifest
from cache.repair import sound_part
from cache.sketches import NONE
from cache.spill import stored_key_set
from pipeline.data.tables import iter_responses
from pipeline.errors import RequestError
from pipeline.params import ScoreParams, SketchParams, Trainable
from pipeline.progress import activity
from pipeline.reference.identity import reference_identity
from pipeline.reference.sketching import sketch_identity
from pipeline.workspace import journal_folder, sketch_journal_folder

_BATCH_ROWS = 1 << 16
OTHER_KEYS = (
    "No row of this reference is for any of these prompts: the tokenizer, the chat template or the truncation changed, "
    "or this is another dataset."
)


def explain_reuse(*, pairs: Path, model: Path, reference: Path, params: ScoreParams) -> dict[str, Any]:
    """What the next `score` of `pairs` under `model` would reuse, and why not the rest; starts no engine, changes
    nothing, and works beside a running scorer.

    Returns: identity and reference_id; responses, reusable, missing; missing_responses (under prompts that have rows)
    and missing_prompts (rows under prompts without any); `published` and `journals` with the fields that differ, as
    {field: [theirs, ours]}; `reasons`, sentences for people, empty where all is reused.
    """
    with _asked(pairs) as asked:
        if not len(asked.keys):
            raise RequestError(f"{pairs} has no responses to score. Run `dvc repro prepare` on data with pairs.")
        with activity(f"digesting {model}"):
            identity = reference_identity(model, dtype=params.dtype, quantization=params.quantization)
        return _explain(asked, identity, reference, journal_folder())


def explain_sketch_reuse(
    *,
    pairs: Path,
    model: Path,
    sketches: Path,
    params: SketchParams,
    trainable: Trainable,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """As `explain_reuse`, of the next `sketch`; loads the model. With sketch.mode none no response is asked for."""
    with _asked(pairs, "train") as asked:
        if not len(asked.keys):
            raise RequestError(f"{pairs} has no training responses to sketch. Add pairs, or lower prepare.test_share.")
        identity = sketch_identity(model, params=params, trainable=trainable, trust_remote_code=trust_remote_code)
        if identity.mode == NONE:
            asked = replace(asked, keys=KeySet(), split="none")
        return _explain(asked, identity, sketches, sketch_journal_folder())


@dataclass
class _Asked:
    """The responses of a prepared folder that are asked for, of one split or (None) both; keys and prompts: theirs,
    mapped from files in `scratch`."""

    pairs: Path
    split: str | None
    scratch: Path
    keys: KeySet = field(default_factory=KeySet)
    prompts: KeySet = field(default_factory=KeySet)

    def batches(self) -> Iterator[pl.DataFrame]:
        for rows in iter_responses(self.pairs, ["response_key", "prompt_key", "split"], rows=_BATCH_ROWS):
            yield rows if self.split is None else rows.filter(pl.col("split") == self.split)

    def stored(self, column: str) -> KeySet:
        return stored_key_set((rows.select(column).to_arrow() for rows in self.batches()), self.scratch / column)


@contextmanager
def _asked(pairs: Path, split: str | None = None) -> Iterator[_Asked]:
    with TemporaryDirectory(prefix="refcache-") as scratch:
        asked = _Asked(pairs, split, Path(scratch))
        asked.keys, asked.prompts = asked.stored("response_key"), asked.stored("prompt_key")
        yield asked


def _explain(asked: _Asked, identity: Identity, reference: Path, journal_root: Path) -> dict[str, Any]:
    published, sound = _published(reference, identity)
    known = [stored_key_set(sound.key_tables(), asked.scratch / "published")] if sound else []
    journals = []
    for folder in find_journals(journal_root):
        found, keys = _journal(folder, journal_root, identity, asked)
        journals.append(found)
        if found["ours"]:
            known.append(keys)
    rows = _missing(asked, known)
    reusable = len(asked.keys) - rows["missing"]
    return {
        "reference_id": identity.reference_id,
        "identity": identity.to_dict(),
        "responses": len(asked.keys),
        "reusable": reusable,
        **rows,
        "published": published,
        "journals": journals,
        "reasons": _reasons(rows, published, journals, reusable),
    }


def _published(reference: Path, identity: Identity) -> tuple[dict[str, Any], StoredRows | None]:
    """What stands at `reference`, and its rows that the stage would take."""
    found: dict[str, Any] = {"path": str(reference), "reference_id": None, "rows": 0, "differs": {}, "problem": None}
    try:
        manifest = read_manifest(reference)
    except CacheIncomplete:
        found["problem"] = "nothing is published there"
    except CacheCorrupt as error:
        found["problem"] = str(error)
    else:
        if manifest.kind != identity.kind.name:
            kinds = f"{manifest.kind}, expected {identity.kind.name}"
            raise RequestError(f"{reference} holds {kinds}. Name another folder with --reference, or use --sketches.")
        found |= {"reference_id": manifest.reference_id, "rows": manifest.n_rows}
        if manifest.identity.get("mode") == NONE:
            found["problem"] = "no sketches were asked for (sketch.mode none)"
        else:
            found["differs"] = _differences(type(identity).from_dict(manifest.identity), identity)
    sound = sound_part(reference, identity)
    lost = found["rows"] - (sound.n_rows if sound else 0)
    if not found["differs"] and not found["problem"] and lost > 0:
        found["problem"] = f"{lost} of its rows are in damaged or missing shards (see `refcache verify {reference}`)"
    return found, sound


def _journal(folder: Path, root: Path, identity: Identity, asked: _Asked) -> tuple[dict[str, Any], KeySet]:
    """What the journal in `folder` holds, and its keys."""
    place = folder.relative_to(root)
    reference_id = place.parts[0]
    try:
        keys, problem = stored_key_set(journalled_key_tables(folder), asked.scratch / "journals" / place), None
    except CacheError as error:
        keys, problem = KeySet(), str(error)
    recorded = recorded_identity(root / reference_id, type(identity))
    found = {
        "path": str(folder),
        "reference_id": reference_id,
        "ours": reference_id == identity.reference_id,
        "rows": len(keys),
        "rows_for_these_pairs": keys.shared_with(asked.keys),
        "differs": _differences(recorded, identity) if recorded else {},
        "problem": problem,
    }
    return found, keys


def _differences(theirs: Identity, ours: Identity) -> dict[str, list[Any]]:
    return {field: list(values) for field, values in theirs.differences(ours).items()}


def _missing(asked: _Asked, known: list[KeySet]) -> dict[str, int]:
    lacking = np.zeros(len(asked.prompts), np.int32)  # rows of each prompt
    has_rows = np.zeros(len(asked.prompts), np.bool_)
    for rows in asked.batches():
        keys, prompts = key_array(rows["response_key"]), asked.prompts.positions(key_array(rows["prompt_key"]))
        there = np.zeros(len(keys), np.bool_)
        for source in known:
            there |= source.contains(keys)
        has_rows[prompts[there]] = True
        np.add.at(lacking, prompts[~there], 1)
    missing, under_known = int(lacking.sum()), int(lacking[has_rows].sum())
    return {"missing": missing, "missing_responses": under_known, "missing_prompts": missing - under_known}


def _reasons(
    rows: dict[str, int], published: dict[str, Any], journals: list[dict[str, Any]], reusable: int
) -> list[str]:
    if not rows["missing"]:
        return []
    reasons = []
    if published["differs"]:
        reasons.append(f"{published['path']} holds another reference: {_show(published['differs'])}.")
    elif published["problem"]:
        reasons.append(f"{published['path']}: {published['problem']}.")
    for journal in journals:
        if journal["problem"]:
            reasons.append(f"{journal['path']}: {journal['problem']}")
        elif not journal["ours"] and journal["rows_for_these_pairs"]:
            named = _show(journal["differs"]) or "one that its folder does not name"
            of = f"{journal['rows_for_these_pairs']:,} of these responses"
            reasons.append(f"The journal {journal['path']} holds {of} under another reference: {named}.")
    has_rows = any(journal["ours"] and journal["rows"] for journal in journals)
    has_rows |= published["rows"] > 0 and not published["differs"]
    if reusable:
        if rows["missing_responses"]:
            reasons.append(f"{rows['missing_responses']:,} responses are new under prompts that have rows.")
        if rows["missing_prompts"]:
            reasons.append(f"{rows['missing_prompts']:,} responses are under new prompts.")
    elif has_rows:
        reasons.append(OTHER_KEYS)
    return reasons


def _show(differs: dict[str, list[Any]]) -> str:
    return "; ".join(
        f"{field} is {short_digest(theirs)} there, {short_digest(ours)} now"
        for field, (theirs, ours) in differs.items()
    )
