"""What must be installed or downloaded before tasks run, checked without a download."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from pipeline.errors import RequestError

INSTALL = "`pip install -e .[eval]`"


def check_installed() -> None:
    if find_spec("lm_eval") is None:
        raise RequestError(
            "evaluate.tasks names benchmark tasks, which are lm-evaluation-harness's, and that is not installed. Run "
            f"{INSTALL}, or leave evaluate.tasks empty."
        )


def is_ifeval(config: Mapping[str, Any]) -> bool:
    """Whether answers are judged by one of the harness's copies of IFEval's checks. config: functions as paths."""
    return "ifeval/" in str(config.get("process_results", ""))


def check_ifeval(task: str) -> None:
    """The checks would download what they lack when they are imported, and without a network fail item by item."""
    absent = [name for name in ("langdetect", "immutabledict", "nltk") if find_spec(name) is None]
    if absent:
        raise RequestError(f"{task} needs {', '.join(absent)}, not installed here. Run {INSTALL}.")
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise RequestError(
            f"{task} splits answers into sentences by nltk's punkt_tab, which is not there. Run `python -m "
            "nltk.downloader punkt_tab`; without a network copy the folder tokenizers/punkt_tab from a machine that "
            "has it into one of nltk's data folders ($NLTK_DATA)."
        ) from None
