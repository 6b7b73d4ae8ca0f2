"""The sections `model` and `prepare`: where the reference comes from, and what the pairs are."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.params.forms import ColumnNames, FormName, PreferredParams, RankedParams
from pipeline.params.ranges import NonNegative, Positive, Section, Share


class ScratchModel(Section):
    """A model built from a config with random weights: any causal architecture that transformers knows."""

    architecture: str = "qwen2"  # transformers' model_type
    vocabulary_size: Annotated[int, Field(ge=261)] = 1024  # of the BPE trained on the sft rows; 261: bytes and specials
    config: dict[str, Any] = Field(default_factory=dict)  # passed to the architecture's config class
    seed: NonNegative = 0


class ModelParams(Section):
    """Either `name` (hub id or local folder) or `scratch`; `adapter`: a LoRA of `name` to merge into it."""

    name: str | None = None
    revision: str | None = None
    adapter: str | None = None  # peft adapter, local folder or hub id; the reference is the merged model
    trust_remote_code: bool = False
    scratch: ScratchModel | None = None

    @model_validator(mode="after")
    def one_origin(self) -> Self:
        if (self.name is None) == (self.scratch is None):
            raise ValueError("give either model.name (hub id or local folder) or model.scratch, and null for the other")
        if self.adapter is not None and self.name is None:
            raise ValueError("model.adapter belongs to model.name; a model from scratch has none")
        return self


class DemoParams(Section):
    prompts: Positive = 400  # distinct prompts with pairs
    sft_rows: Positive = 3000
    seed: NonNegative = 0


class FilesParams(Section):
    """Files, patterns (*.jsonl.gz) or folders under prepare.input. `test_pairs` empty: split `pairs` by prompt."""

    pairs: list[str] = Field(min_length=1)
    test_pairs: list[str] = Field(default_factory=list)


class HubParams(Section):
    """A dataset on the hub, or a local folder that `datasets` can load. `test_split` null: split by prompt."""

    dataset: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    test_split: str | None = None


class SftRowsParams(Section):
    """Where the sft rows come from: `files` of prompt and completion, or the chosen responses of a share of the pairs.

    `pairs_files` limits the second form to some of the pair files (empty: the first one), so that pair files added
    later leave the sft rows, hence the reference, untouched. `source: none` writes no rows (for sft.epochs: 0).
    """

    source: Literal["files", "pairs", "demo", "none"] = "demo"
    files: list[str] = Field(default_factory=list)
    pairs_share: Share = 1.0
    pairs_files: list[str] = Field(default_factory=list)


class PrepareParams(Section):
    source: Literal["demo", "files", "hub"] = "demo"
    input: str = "data/input"  # folder of the files; DVC watches it
    demo: DemoParams = DemoParams()
    files: FilesParams | None = None
    hub: HubParams | None = None
    columns: ColumnNames = ColumnNames()
    form: FormName = "auto"  # how rows are published (docs/data.md); auto: found by their columns, row by row
    preferred: PreferredParams | None = None  # two responses and a column that says which is better
    ranked: RankedParams | None = None  # a list of responses with scores
    feedback: bool = False  # also split pairs into rows of feedback, for objective kto; adds a response a side to score
    wrong_options: Literal["one", "all"] = "one"  # of a multiple-choice question, against the right one
    sft: SftRowsParams = SftRowsParams()
    chat_template: Literal["auto", "never"] | str = "auto"  # or a path to a jinja file
    after_end: Literal["drop", "keep"] = "drop"  # what a chat template writes behind the end token; keep: as TRL trains
    max_tokens: Positive = 1024  # prompt and response together; responses keep their start
    max_prompt_tokens: Positive = 512
    long_prompts: Literal["drop", "truncate_left"] = "drop"
    test_share: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of the prompts, where no test file or split is given
    split_seed: NonNegative = 0
    on_bad_row: Literal["fail", "skip"] = "fail"

    @model_validator(mode="after")
    def source_is_described(self) -> Self:
        if self.source == "files" and self.files is None:
            raise ValueError("source: files needs prepare.files.pairs (a list of file names under prepare.input)")
        if self.source == "hub" and self.hub is None:
            raise ValueError("source: hub needs prepare.hub.dataset")
        self._form_is_described()
        if self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(
                f"max_prompt_tokens ({self.max_prompt_tokens}) must be below max_tokens ({self.max_tokens})"
            )
        if self.sft.source == "files" and not self.sft.files:
            raise ValueError("sft.source: files needs prepare.sft.files (file names under prepare.input)")
        if self.sft.source == "demo" and self.source != "demo":
            raise ValueError("sft.source: demo goes with source: demo; choose files, pairs or none")
        pairs_files = self.files.pairs if self.source == "files" and self.files else []
        foreign = [name for name in self.sft.pairs_files if name not in pairs_files]
        if self.sft.source == "pairs" and foreign:
            raise ValueError(f"sft.pairs_files names {foreign}, which are not among prepare.files.pairs {pairs_files}")
        return self

    def _form_is_described(self) -> None:
        ranked = self.ranked is not None and self.ranked.column is not None
        if self.preferred is not None and ranked:
            raise ValueError("prepare.preferred and prepare.ranked.column are two forms; keep one")
        if self.preferred is None and self.form == "preferred":
            raise ValueError("form: preferred needs prepare.preferred: {column, a, b, a_wins, b_wins}")
        if not ranked and self.form == "ranked":
            raise ValueError("form: ranked needs prepare.ranked: {column, text, score}")
        if self.ranked is not None and ranked and self.ranked.score is None:
            raise ValueError("prepare.ranked.column needs prepare.ranked.score, by which its responses are ranked")
        if self.preferred is not None and self.form not in ("auto", "preferred"):
            raise ValueError(f"prepare.preferred goes with form: preferred (or auto), found {self.form}")
        if ranked and self.form not in ("auto", "ranked"):
            raise ValueError(f"prepare.ranked.column goes with form: ranked (or auto), found {self.form}")
