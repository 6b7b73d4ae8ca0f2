"""The Hugging Face hub where there is no network: its libraries try for half a minute before they say so."""

import sys
import threading
from functools import cache

REACHED_WITHIN = 3.0  # seconds


@cache
def meet_hub() -> None:
    """Ask the hub once in a process; out of reach, let its libraries use their cached copies and fail at once.

    HF_HUB_OFFLINE says the same without asking. Proxies and HF_ENDPOINT are those of huggingface_hub.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        return
    print(f"{constants.ENDPOINT} can't be reached; only copies in the Hugging Face cache are used.", file=sys.stderr)
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True  # its own copy


def _answers(address: str) -> bool:
    """Whether anything is heard from there; names are looked up without a limit of time, hence the thread."""
    from huggingface_hub import get_session

    heard = threading.Event()

    def ask() -> None:
        try:
            get_session().head(address, timeout=REACHED_WITHIN)
        except Exception:  # whatever its HTTP library raises: nothing was heard
            return
        heard.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACHED_WITHIN)
    return heard.is_set()
