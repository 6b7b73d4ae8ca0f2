"""What notebooks and other programs import from this project (docs/api.md).

    import refcache

    cache = refcache.Cache("data/reference/logps", tokenizer="data/prepared/tokenizer")
    cache.token_logps("What is 2 + 3?", "5")
    refcache.score(pairs, "models/reference")
    refcache.implicit_rewards("models/policies/dpo-0", pairs, cache, beta=0.1)

`refcache.objectives` holds the losses as plain functions, `refcache.trl` TRL's trainers on a cache.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refcache.rewards import implicit_rewards
    from refcache.scoring import score
    from refcache.texts import Cache

__all__ = ["Cache", "implicit_rewards", "score"]

_HOMES = {"Cache": "texts", "implicit_rewards": "rewards", "score": "scoring"}


def __getattr__(name: str) -> Any:
    # Imported when asked for: `refcache --help` goes through this package, too, and these take seconds.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from refcache.packages import check_packages

    check_packages()
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
