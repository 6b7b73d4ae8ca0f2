"""The section `evaluate.suites`: further sets of pairs that policies are judged by (docs/evaluation.md)."""

import re
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from pipeline.params.data import FilesParams, HubParams, PrepareParams
from pipeline.params.forms import ColumnNames, FormName, PreferredParams, RankedParams
from pipeline.params.ranges import Positive, Section

# Ids of the subset Ties of RewardBench 2 (arXiv 2506.01937): a question with one right answer, or asked so that several
# are equally right; and its number.
TIES_ID = re.compile(r"(ref|tied):(.+)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class SuiteParams(Section):
    """One set of pairs: `files` under evaluate.suites_input, or a split of a `hub` dataset; else as prepare has it."""

    files: list[str] = Field(default_factory=list)
    hub: HubParams | None = None
    columns: ColumnNames = ColumnNames()
    form: FormName = "auto"
    preferred: PreferredParams | None = None
    ranked: RankedParams | None = None
    wrong_options: Literal["one", "all"] = "one"
    max_tokens: Positive | None = None  # null: as prepare has it
    max_prompt_tokens: Positive | None = None
    on_bad_row: Literal["fail", "skip"] = "fail"
    domain: Literal["in", "out"] = "out"  # whether its prompts are like those that policies are trained on
    ties: bool = False  # whether its rows have ids ref:N and tied:N, as the subset Ties of RewardBench 2

    @model_validator(mode="after")
    def has_one_source(self) -> Self:
        if bool(self.files) == (self.hub is not None):
            raise ValueError("give either files (names under evaluate.suites_input) or hub: {dataset: ..., split: ...}")
        if self.hub is not None and self.hub.test_split is not None:
            raise ValueError("a suite is one split of a dataset: name it in hub.split and leave hub.test_split out")
        return self

    def prepare_params(self, own: PrepareParams, folder: str) -> PrepareParams:
        """How this suite's rows are prepared. own: the section prepare, whose limits and kind of prompt hold here too;
        folder: evaluate.suites_input. Raises ValueError for settings that `prepare` would refuse."""
        settings: dict[str, Any] = {
            "source": "hub" if self.hub else "files",
            "input": folder,
            "files": FilesParams(pairs=self.files) if self.files else None,
            "sft": {"source": "none"},
            "test_share": 0.0,
            # The prepared tokenizer has prepare's template with it.
            "chat_template": "never" if own.chat_template == "never" else "auto",
            "after_end": own.after_end,
            "max_tokens": self.max_tokens or own.max_tokens,
            "max_prompt_tokens": self.max_prompt_tokens or own.max_prompt_tokens,
            "long_prompts": own.long_prompts,
        }
        for name in ("hub", "columns", "form", "preferred", "ranked", "wrong_options", "on_bad_row"):
            settings[name] = getattr(self, name)
        return PrepareParams(**settings)

    def in_these_words(self, text: str, name: str) -> str:
        """What `prepare` says of the suite `name`, with this section's keys in place of prepare's."""

        def key(found: re.Match[str]) -> str:
            if found[1] == "input":
                return "evaluate.suites_input"
            return f"evaluate.suites.{name}.{found[1]}" if found[1] in SuiteParams.model_fields else found[0]

        text = text.replace("--on-bad-row skip (or prepare.on_bad_row: skip)", "prepare.on_bad_row: skip")
        return re.sub(r"\bprepare\.(\w+)", key, text.replace("prepare.files.pairs", "prepare.files"))


def check_suites(suites: dict[str, SuiteParams], own: PrepareParams, folder: str) -> None:
    """Raise ValueError for a name that is no file name, or settings that `prepare` would refuse."""
    for name, suite in suites.items():
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"evaluate.suites: {name!r} can't be a suite's name, which is a folder's too; letters, digits, "
                "underscores and hyphens are allowed, up to 64, a letter or digit first"
            )
        same = [other for other in suites if other.lower() == name.lower()]
        if len(same) > 1:
            raise ValueError(f"evaluate.suites: {' and '.join(map(repr, same))} would share one folder on some disks")
        try:
            suite.prepare_params(own, folder)
        except ValidationError as error:
            reason = "; ".join(str(problem["msg"]) for problem in error.errors(include_url=False))
            raise ValueError(f"evaluate.suites.{name}: {suite.in_these_words(reason, name)}") from None
