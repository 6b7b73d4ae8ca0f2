"""Adapters merged into whole weights, and the folder that an engine can load a policy from."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import RequestError
from pipeline.model.opening import open_model
from pipeline.model.proof import Answers, answers, require_same_answers, require_written
from pipeline.progress import activity
from pipeline.trainable.adapters import merged, open_adapter
from pipeline.workspace import scratch_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def loadable(policy: Path, reference_model: Path, *, trust_remote_code: bool = False) -> Iterator[Path]:
    """The folder to load `policy` from: itself, or for a peft adapter a temporary merge with the reference model.

    The merge is removed on leaving; one that a killed run left behind is removed on entering.
    """
    if not policy.is_dir():
        raise RequestError(f"{policy} does not exist; it is written by `refcache train` (run `dvc repro train`).")
    if not (policy / "adapter_config.json").exists():
        yield policy
        return
    _remove_orphans()
    folder = Path(tempfile.mkdtemp(prefix=f"merged-{os.getpid()}-", dir=scratch_folder()))
    try:
        with activity(f"merging {policy} into {reference_model}"):
            _merge(policy, reference_model, folder, trust_remote_code=trust_remote_code)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_orphans() -> None:
    for folder in scratch_folder().glob("merged-*-*"):
        try:
            os.kill(int(folder.name.split("-")[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (PermissionError, ValueError):
            continue  # somebody else's, and alive


def _merge(adapter: Path, base: Path, out: Path, *, trust_remote_code: bool) -> None:
    import torch

    # float32, so that the merge adds no rounding of its own; vLLM casts to score.dtype.
    model = open_model(base, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model, expected = merge_adapter(model, adapter, failed=f"{adapter} can't be merged into {base}")
    model.save_pretrained(out)
    del model  # not both at once
    require_written(out, expected, trust_remote_code=trust_remote_code)


def merge_adapter(model: "PreTrainedModel", adapter: str | Path, *, failed: str) -> tuple["PreTrainedModel", Answers]:
    """Plain weights with the adapter added: what is scored, trained from and digested is then one and the same.

    Returns them with `proof.answers` of the model with its adapter, for what will be written. adapter: a peft adapter,
    local folder or hub id. failed: how the message begins; raises RequestError as `open_adapter`, RunFailed where the
    merged model answers otherwise.
    """
    adapted = open_adapter(model, adapter, failed=failed)
    expected = answers(adapted)
    model = merged(adapted, failed=failed)
    require_same_answers(model, expected, failed)
    return model, expected
