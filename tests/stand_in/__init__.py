"""A stand-in for vLLM inside the real engine process; see engine.py."""

import json
import os
from pathlib import Path
from typing import Any


def environment(wish: dict[str, Any]) -> dict[str, str]:
    """Variables under which engines that start get the stand-in; wish: $REFCACHE_STAND_IN of engine.py."""
    here = str(Path(__file__).parent)
    search = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": search, "REFCACHE_STAND_IN": json.dumps(wish)}
