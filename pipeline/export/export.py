"""`refcache export`: pairs with their reference log-probs as a folder of files for other programs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache import open_reference, open_view
from cache.errors import system_errors
from pipeline.data.prepare import staged_outputs
from pipeline.errors import RequestError
from pipeline.export.forms import FORMS, Part
from pipeline.export.pairs import coverage, joined_pairs
from pipeline.export.texts import Texts
from pipeline.files import write_json
from pipeline.tokens.view import open_token_view
from pipeline.workspace import views_folder

DESCRIPTION = "export.json"  # written last
EXPORT_VERSION = 1


def export_pairs(
    *,
    pairs: Path,
    reference: Path,
    out: Path,
    to: str,
    splits: Sequence[str],
    tokenizer: Path,
    allow_missing: bool = False,
    hash: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the pairs of `splits` to the folder `out` in form `to` (one of FORMS); returns what export.json says.

    The folder takes its place whole, or nothing changes; the same pairs, cache and tokenizer give the same bytes.
    Memory holds some thousand pairs; .refcache/views gets mapped copies of the cache and the token ids, which trainings
    use as well. tokenizer: read by the forms that render texts. Raises RequestError, CacheIncomplete for pairs whose
    rows the cache lacks unless `allow_missing`, and what `open_reference` raises.
    """
    form = FORMS[to]
    _require_sense(to, splits, allow_missing, hash)
    _refuse_foreign_folder(out)
    stored = open_reference(reference, expect=None)
    view = open_view(stored, views_folder())
    counts = {split: coverage(pairs, split, view, allow_missing=allow_missing) for split in splits}
    for split, count in counts.items():
        if not count.pairs:
            raise RequestError(f"{pairs} holds no {split} pair, so there is nothing to export of that split.")
    texts = _texts(tokenizer, trust_remote_code) if form.renders else None
    tokens = open_token_view(pairs)
    with (
        system_errors(f"write {out}", kept="What was there before is intact."),
        staged_outputs([out]) as (staged,),
    ):
        staged.mkdir()
        for split, count in counts.items():
            form.write(Part(staged, split, count.pairs, joined_pairs(pairs, split, view, tokens), texts, hash))
        description: dict[str, Any] = {
            "format_version": EXPORT_VERSION,
            "form": to,
            "reference_id": stored.manifest.reference_id,
            "identity": stored.identity.to_dict(),
            "pairs": {split: count.pairs for split, count in counts.items()},
            "pairs_without_log_probs": {split: count.missing for split, count in counts.items()},
        }
        if texts is not None:
            description["encoded_again"] = {"pairs": texts.checked, "same_token_ids": texts.same}
        write_json(staged / DESCRIPTION, description)
    return description


def _texts(folder: Path, trust_remote_code: bool) -> Texts:
    from pipeline.model.tokenizer import open_prepared_tokenizer

    return Texts(open_prepared_tokenizer(folder, trust_remote_code=trust_remote_code))


def _require_sense(to: str, splits: Sequence[str], allow_missing: bool, hash: str | None) -> None:
    if allow_missing and not FORMS[to].has_nulls:
        raise RequestError(
            f"--allow-missing: {to} has no way to say that a pair has no log-prob, and would train on whatever stood "
            "there. Score the missing rows (`dvc repro score`), or export to parquet, jsonl or trl."
        )
    if (to == "open-instruct") != (hash is not None):
        raise RequestError(
            "--hash names the file that open-instruct looks for: give it with --to open-instruct, and only there. Its "
            "log says `Reference logprobs cache path: .../HASH.pt` as a run begins."
        )
    if hash is not None and not hash.isalnum():
        raise RequestError(f"--hash is {hash!r}; it is the letters and digits before .pt in the path in that log.")
    if to == "open-instruct" and len(splits) > 1:
        raise RequestError("--to open-instruct writes one file for one data set: give one --split.")


def _refuse_foreign_folder(out: Path) -> None:
    """The folder is replaced as a whole, so it must not be somebody's folder of other things."""
    if out.exists() and not (out / DESCRIPTION).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise RequestError(f"{out} is there and is no earlier export ({DESCRIPTION} is missing). Name another --out.")
