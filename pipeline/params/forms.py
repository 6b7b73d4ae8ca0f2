"""How published rows say what is asked, what is better and what is worse: `prepare.form` and its sections."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.params.ranges import NonNegative, Section

FormName = Literal[
    "auto",
    "pairs",
    "implicit_text",
    "openai",
    "alpaca_list",
    "swift",
    "preferred",
    "shp",
    "helpsteer2",
    "helpsteer3",
    "pku_saferlhf",
    "arena",
    "arena_55k",
    "ranked",
    "ultrafeedback",
    "nectar",
    "multiple_choice",
    "unpaired",
]
Label = str | int | float | bool
Sign = Literal["negative", "positive"]

_TIES: tuple[Label, ...] = ("tie", "tie (bothbad)", "both_bad", "bothbad")
# Other usual names, each tried where the row has no column of the name before it and none was chosen.
_ALSO = {
    "prompt": ("question", "instruction", "query"),
    "system": ("system_prompt",),
    "messages": ("conversations", "conversation", "trajectory"),
}


class ColumnNames(Section):
    """Column names in the input. `category` and the rewards are optional; a missing `prompt` means implicit prompts.

    system, input, history, messages: null leaves such a column out.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    label: str = "label"  # of unpaired feedback: whether the completion is desirable
    category: str = "category"
    chosen_reward: str = "chosen_reward"
    rejected_reward: str = "rejected_reward"
    system: str | None = "system"  # text of a system turn
    input: str | None = "input"  # text that follows the instruction, on a line of its own
    history: str | None = "history"  # earlier turns: [question, answer] pairs or messages
    messages: str | None = "messages"  # a dialogue that is the prompt, or ends with the chosen answer

    def candidates(self, meaning: str) -> tuple[str, ...]:
        """The columns that may hold `meaning`, in the order in which they are looked for."""
        name: str | None = getattr(self, meaning)
        if name is None:
            return ()
        return (name,) if meaning in self.model_fields_set else (name, *_ALSO.get(meaning, ()))


class PreferredParams(Section):
    """Two responses, and a column that says which one is better: by a label, a sign, or a column's name."""

    column: str
    a: str
    b: str
    a_wins: list[Label] | Sign | None = None  # values of `column`, or its sign; null: the name of column a
    b_wins: list[Label] | Sign | None = None
    ties: list[Label] = Field(default_factory=lambda: list(_TIES))  # left out and counted; so is a 0 among signs
    a_reward: str | None = None
    b_reward: str | None = None

    @model_validator(mode="after")
    def tells_a_from_b(self) -> Self:
        if self.a == self.b:
            raise ValueError(f"prepare.preferred.a and b are both {self.a!r}; name the columns of two responses")
        signs = [wins for wins in (self.a_wins, self.b_wins) if isinstance(wins, str)]
        if signs and (len(signs) < 2 or signs[0] == signs[1]):
            raise ValueError("of prepare.preferred.a_wins and b_wins one must be negative and the other positive")
        both = [value for value in self.values("a") if value in self.values("b")]
        if both:
            raise ValueError(f"prepare.preferred: {both} can't mean that a wins and that b wins")
        return self

    def values(self, side: Literal["a", "b"]) -> list[Label]:
        """The labels by which `side` wins; none where signs decide."""
        wins = self.a_wins if side == "a" else self.b_wins
        return [] if isinstance(wins, str) else [self.a if side == "a" else self.b] if wins is None else wins


class RankedParams(Section):
    """A list of responses with scores or ranks, and which pairs to make of it.

    Paths go into structs with dots ("annotations.helpfulness.Rating"). column, text and score may stay away where the
    form is ultrafeedback or nectar.
    """

    column: str | None = None  # a list of structs, or of texts
    text: str | None = None  # path to the text in each struct
    score: str | None = None  # path to a number in each struct; for a list of texts, a column with as many numbers
    better: Literal["higher", "lower"] | None = None  # scores are better higher, ranks lower
    pairs: Literal["best_vs_worst", "best_vs_random", "all", "adjacent"] = "best_vs_worst"
    min_gap: Annotated[float, Field(ge=0)] = 0.0  # smaller differences make no pair; equal scores never do
    seed: NonNegative = 0  # of best_vs_random
