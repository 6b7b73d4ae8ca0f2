"""Why the next `score` or `sketch` reuses its rows, or does not: which identity field differs, which rows are new."""

from pathlib import Path
from typing import Any

import polars as pl

from cache import CacheCorrupt, CacheError, CacheIncomplete
from cache.garbage import find_journals, journalled_keys
from cache.identity import Identity, recorded_identity, short_digest
from cache.manifest import read_manifest
from cache.repair import sound_part
from cache.sketches import NONE
from pipeline.data.tables import read_responses
from pipeline.errors import RequestError
from pipeline.params import ScoreParams, SketchParams, Trainable
from pipeline.progress import activity
from pipeline.reference.identity import reference_identity
from pipeline.reference.sketching import sketch_identity
from pipeline.workspace import journal_folder, sketch_journal_folder

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
    responses = read_responses(pairs)
    if responses.is_empty():
        raise RequestError(f"{pairs} has no responses to score. Run `dvc repro prepare` on data with pairs.")
    with activity(f"digesting {model}"):
        identity = reference_identity(model, dtype=params.dtype, quantization=params.quantization)
    return _explain(responses, identity, reference, journal_folder())


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
    responses = read_responses(pairs).filter(pl.col("split") == "train")
    if responses.is_empty():
        raise RequestError(f"{pairs} has no training responses to sketch. Add pairs, or lower prepare.test_share.")
    identity = sketch_identity(model, params=params, trainable=trainable, trust_remote_code=trust_remote_code)
    if identity.mode == NONE:
        responses = responses.clear()
    return _explain(responses, identity, sketches, sketch_journal_folder())


def _explain(responses: pl.DataFrame, identity: Identity, reference: Path, journal_root: Path) -> dict[str, Any]:
    needed = set(responses["response_key"])
    published, known = _published(reference, identity)
    journals = []
    for folder in find_journals(journal_root):
        found = _journal(folder, journal_root, identity, needed)
        journals.append(found)
        if found["ours"]:
            known |= journalled_keys(folder)
    rows = _missing(responses, known)
    return {
        "reference_id": identity.reference_id,
        "identity": identity.to_dict(),
        "responses": len(needed),
        "reusable": len(needed & known),
        **rows,
        "published": published,
        "journals": journals,
        "reasons": _reasons(rows, published, journals, needed & known),
    }


def _published(reference: Path, identity: Identity) -> tuple[dict[str, Any], set[bytes]]:
    """What stands at `reference`, and the keys of its rows that the stage would take."""
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
    keys = sound.keys() if sound else set[bytes]()
    if not found["differs"] and not found["problem"] and len(keys) < found["rows"]:
        lost = found["rows"] - len(keys)
        found["problem"] = f"{lost} of its rows are in damaged or missing shards (see `refcache verify {reference}`)"
    return found, keys


def _journal(folder: Path, root: Path, identity: Identity, needed: set[bytes]) -> dict[str, Any]:
    reference_id = folder.relative_to(root).parts[0]
    try:
        keys, problem = journalled_keys(folder), None
    except CacheError as error:
        keys, problem = set(), str(error)
    recorded = recorded_identity(root / reference_id, type(identity))
    return {
        "path": str(folder),
        "reference_id": reference_id,
        "ours": reference_id == identity.reference_id,
        "rows": len(keys),
        "rows_for_these_pairs": len(keys & needed),
        "differs": _differences(recorded, identity) if recorded else {},
        "problem": problem,
    }


def _differences(theirs: Identity, ours: Identity) -> dict[str, list[Any]]:
    return {field: list(values) for field, values in theirs.differences(ours).items()}


def _missing(responses: pl.DataFrame, known: set[bytes]) -> dict[str, int]:
    has_row = pl.col("response_key").is_in(list(known)) if known else pl.lit(False)
    marked = responses.select("response_key", "prompt_key", has_row.alias("has_row"))
    marked = marked.with_columns(pl.col("has_row").any().over("prompt_key").alias("known_prompt"))
    missing = marked.filter(~pl.col("has_row"))
    under_known = int(missing["known_prompt"].sum())
    return {
        "missing": len(missing),
        "missing_responses": under_known,
        "missing_prompts": len(missing) - under_known,
    }


def _reasons(
    rows: dict[str, int], published: dict[str, Any], journals: list[dict[str, Any]], reusable: set[bytes]
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
