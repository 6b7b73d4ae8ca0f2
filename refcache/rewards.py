"""Implicit rewards of a policy against a reference cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from pipeline.errors import RequestError
from refcache.encoding import Pair, Rows, Side
from refcache.texts import Cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_TOKENS = 1024  # whose vocabulary-wide logits exist at once


def implicit_rewards(
    policy: "Path | str | PreTrainedModel", pairs: Rows, cache: Cache, *, beta: float, base: Path | str | None = None
) -> pl.DataFrame:
    """What `policy` makes of pairs, against the reference: beta (log pi_theta - log pi_ref) of both sides (DPO, eq. 5).

    policy: a transformers or peft model, which is used as it is, or a folder, opened in float32; for the folder of an
    adapter, base is that of the reference it was trained on. cache: opened with a tokenizer. Columns: those of
    `Cache.join` and chosen_policy_logp, rejected_policy_logp (nats), chosen_reward, rejected_reward, reward_margin, and
    correct, whether that margin is positive. Raises as `Cache.join`; every value of the reference is found before the
    policy is asked.
    """
    encoded = cache.encode(pairs)
    joined = cache.values_of(encoded)
    columns = _policy_logps(policy, encoded, base)
    rewards = {
        f"{side}_reward": beta * (pl.col(f"{side}_policy_logp") - pl.col(f"{side}_logp"))
        for side in ("chosen", "rejected")
    }
    margin = pl.col("chosen_reward") - pl.col("rejected_reward")
    return (
        joined.with_columns(**{name: pl.Series(values, dtype=pl.Float64) for name, values in columns.items()})
        .with_columns(**rewards)
        .with_columns(reward_margin=margin)
        .with_columns(correct=pl.col("reward_margin") > 0)
    )


def _policy_logps(
    policy: "Path | str | PreTrainedModel", pairs: list[Pair], base: Path | str | None
) -> dict[str, list[float]]:
    import torch

    from pipeline.model.opening import open_model
    from pipeline.trainable.merging import loadable

    if isinstance(policy, str | Path):
        if base is None and (Path(policy) / "adapter_config.json").exists():
            raise RequestError(
                f"{policy} holds an adapter, which is a policy only on top of its model. Give that, too: "
                "base='models/reference'."
            )
        with loadable(Path(policy), Path(base or policy)) as folder:
            model: Any = open_model(folder, dtype=torch.float32)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    else:
        model = policy
    was_training = model.training
    model.eval()
    try:
        asked = _Policy(model)
        return {
            "chosen_policy_logp": [asked.logp(pair.chosen) for pair in pairs],
            "rejected_policy_logp": [asked.logp(pair.rejected) for pair in pairs],
        }
    finally:
        model.train(was_training)


class _Policy:
    """Sums of a response's log-probs, one response at a time, so that no row's length costs another one memory."""

    def __init__(self, model: Any) -> None:
        from pipeline.forward.logps import ResponseLogps

        self._logps = ResponseLogps(model, _CHUNK_TOKENS)
        self._device = next(model.parameters()).device

    def logp(self, side: Side) -> float:
        import torch

        from pipeline.forward.logps import collate

        with torch.inference_mode():
            found = self._logps(*collate([side]).to(self._device)).float().cpu().numpy()
        return float(found.sum(dtype=np.float64))
