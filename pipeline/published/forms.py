"""The forms in which preference rows are published: how each is found by its columns, and what it says.

docs/data.md shows an example of every form with the parameters that it needs.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.params import PrepareParams, RankedParams
from pipeline.published import choices, ranked, winners
from pipeline.published.files import BadRow, Row
from pipeline.published.rows import CONTEXT, BadForm, FeedbackRow, PairRow, asked, ends_with_answer, is_dialogue

Values = Mapping[str, Any]
# What a row holds, how many were left out as ties, and the columns that were used beside what is asked.
Read = tuple[Sequence[PairRow | FeedbackRow], int, set[str]]


class Form(NamedTuple):
    fits: Callable[[Values, PrepareParams], bool]
    read: Callable[[Values, PrepareParams], Read]
    says: str = ""  # what is taken from where; "" for a row that names chosen and rejected itself


class Forms:
    """Reads rows in the form that params name, or finds each row's by its columns; counts what it meets."""

    def __init__(self, params: PrepareParams, *, chat: bool = True) -> None:
        """chat: whether a template reads what rows give it beside messages."""
        self._params = params
        self._unread = frozenset[str]() if chat else frozenset(CONTEXT)
        self._fixed = _fixed(params)
        self.found: Counter[str] = Counter()  # rows by form
        self.ties = 0
        self.seen: set[str] = set()  # columns that hold something in any row
        self.used: set[str] = set()  # those that any row's meaning was taken from

    def read(self, row: Row) -> Iterator[PairRow | FeedbackRow | BadRow]:
        name = self._fixed or next((name for name, form in FORMS.items() if form.fits(row.values, self._params)), None)
        try:
            if name is None:
                raise BadForm(_unknown(row.values, self._params))
            rows, ties, used = FORMS[name].read(row.values, self._params)
        except BadForm as error:
            yield BadRow(row.where, str(error))
            return
        self.found[name] += 1
        self.ties += ties
        self.seen.update(column for column, value in row.values.items() if value is not None)
        self.used |= used.union(*(part.asked.used for part in rows)) - self._unread
        yield from rows


def _fixed(params: PrepareParams) -> str | None:
    if params.preferred is not None:
        return "preferred"
    if params.ranked is not None and params.ranked.column is not None:
        return "ranked"
    return None if params.form == "auto" else params.form


def _with(*names: str) -> Callable[[Values, PrepareParams], bool]:
    return lambda values, params: all(values.get(name) is not None for name in names)


def _has_pair(values: Values, params: PrepareParams) -> bool:
    return _sides(values, params) is not None


def _sides(values: Values, params: PrepareParams) -> tuple[str, str] | None:
    """The columns of chosen and rejected."""
    columns = params.columns
    names = [(columns.chosen, columns.rejected)]
    if not columns.model_fields_set & {"chosen", "rejected"}:
        names.append(("chosen_response", "rejected_response"))
    return next((pair for pair in names if pair[0] in values and pair[1] in values), None)


def _pairs(values: Values, params: PrepareParams) -> Read:
    row, used = _pair(values, params)
    return [row], 0, used


def _pair(values: Values, params: PrepareParams) -> tuple[PairRow, set[str]]:
    sides, columns = _sides(values, params), params.columns
    if sides is None:
        raise BadForm(_unknown(values, params))
    chosen, rejected = (values[name] for name in sides)
    rewards = [columns.chosen_reward, columns.rejected_reward]
    row = PairRow(asked(values, columns, chosen), chosen, rejected, *(values.get(name) for name in rewards))
    return row, {*sides, *rewards}


def _is_implicit(values: Values, params: PrepareParams) -> bool:
    """Two plain texts, and nothing beside them that could be what was asked."""
    columns, sides = params.columns, _sides(values, params)
    if sides is None or not all(isinstance(values[name], str) for name in sides):
        return False
    known = {*sides, columns.category, columns.chosen_reward, columns.rejected_reward}
    others = {name for name, value in values.items() if value is not None} - known
    return not others and not any("Assistant:" in values[name] for name in sides)


def _implicit(values: Values, params: PrepareParams) -> Read:
    """TRL's implicit prompt: what both texts begin with, here up to the last word's end."""
    row, used = _pair(values, params)
    chosen, rejected = row.chosen, row.rejected
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise BadForm(f"chosen is {type(chosen).__name__}, expected text for form: implicit_text")
    end = _last_common_boundary(chosen, rejected)
    if params.chat_template != "never" or not chosen[:end].strip():
        raise BadForm(
            "no prompt: the row has none, and chosen and rejected are no dialogues of messages or of "
            '"Human:/Assistant:" text. What two plain texts begin with is taken for their prompt only with '
            "prepare.chat_template: never, since it is no user's turn"
        )
    found = row.asked._replace(prompt=chosen[:end])
    return [row._replace(asked=found, chosen=chosen[end:], rejected=rejected[end:])], 0, used


def _last_common_boundary(a: str, b: str) -> int:
    """Where the texts part, moved back to the beginning of the word they part in, and before the space ahead of it."""
    end = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if any(text[end : end + 1].isalnum() for text in (a, b)):
        while end and a[end - 1].isalnum():
            end -= 1
    return end - (end > 0 and a[end - 1] == " ")


def _openai(values: Values, params: PrepareParams) -> Read:
    """{"input": {"messages", "tools"}, "preferred_output", "non_preferred_output"} of OpenAI's preference files."""
    request, chosen, rejected = (values.get(name) for name in ("input", "preferred_output", "non_preferred_output"))
    if not isinstance(request, dict) or not is_dialogue(request.get("messages")):
        raise BadForm("input holds no messages, as OpenAI's preference form has them")
    inner = {name: value for name, value in request.items() if name in ("messages", "tools")}
    found = asked(inner, params.columns.model_copy(update={"messages": "messages"}), None)
    return [PairRow(found, chosen, rejected)], 0, {"input", "preferred_output", "non_preferred_output"}


def _alpaca_list(values: Values, params: PrepareParams) -> Read:
    """LLaMA-Factory's earlier alpaca form: output is [better, worse]."""
    output = values["output"]
    if not isinstance(output, list) or len(output) != 2:
        count = len(output) if isinstance(output, list) else type(output).__name__
        raise BadForm(f"output holds {count}, expected two responses, the better one first")
    return [PairRow(asked(values, params.columns, None), *output)], 0, {"output"}


def _swift(values: Values, params: PrepareParams) -> Read:
    """ms-swift: messages (or query and response) that end with the chosen answer, and a rejected one."""
    columns = params.columns
    if values.get("rejected_messages") is not None:
        rejected, used = values["rejected_messages"], {"rejected_messages"}
    else:
        rejected, used = values.get("rejected_response"), {"rejected_response"}
    if values.get("messages") is not None:
        dialogue = values["messages"]
        if not is_dialogue(dialogue) or not ends_with_answer(dialogue):
            raise BadForm("messages must end with the chosen answer of the assistant")
        chosen = dialogue[-1]
        found = asked(values, columns.model_copy(update={"messages": "messages"}), chosen)
        if is_dialogue(rejected) and len(rejected) > 1 and found.prompt == list(dialogue[:-1]):
            chosen = dialogue  # both are whole
            found = found._replace(prompt=None)
    else:
        chosen, found = values["response"], asked(values, columns, None)
        used.add("response")
    return [PairRow(found, chosen, rejected)], 0, used


def _winner(name: str) -> Form:
    rule, prompt = winners.PUBLISHED[name]

    def read(values: Values, params: PrepareParams) -> Read:
        row, used = winners.by_rule(values, params.columns, rule, prompt=prompt)
        return [] if row is None else [row], row is None, used

    columns = winners.PUBLISHED[name].columns
    return Form(_with(*columns), read, f"{rule.a} or {rule.b}, whichever {rule.column} prefers")


def _preferred(values: Values, params: PrepareParams) -> Read:
    assert params.preferred is not None  # PrepareParams sees to it
    row, used = winners.by_rule(values, params.columns, params.preferred)
    return [] if row is None else [row], row is None, used


def _arena_55k(values: Values, params: PrepareParams) -> Read:
    row = winners.arena_55k(values, params.columns)
    return [] if row is None else [row], row is None, set(winners.ARENA_55K)


def _list(name: str) -> Form:
    published = ranked.PUBLISHED[name]

    def read(values: Values, params: PrepareParams) -> Read:
        own = params.ranked.model_dump(exclude_none=True) if params.ranked is not None else {}
        return ranked.by_score(values, params.columns, RankedParams(**published.model_dump(exclude_unset=True) | own))

    def fits(values: Values, params: PrepareParams) -> bool:
        items = values.get(published.column or "")
        return isinstance(items, list) and bool(items) and isinstance(items[0], dict) and published.text in items[0]

    says = f"pairs of {published.column} by {published.score} (prepare.ranked names others and which pairs)"
    return Form(fits, read, says)


def _ranked(values: Values, params: PrepareParams) -> Read:
    assert params.ranked is not None  # PrepareParams sees to it
    return ranked.by_score(values, params.columns, params.ranked)


def _choices(values: Values, params: PrepareParams) -> Read:
    rows, used = choices.by_choice(values, params.columns, params.wrong_options)
    return rows, 0, used


def _unpaired(values: Values, params: PrepareParams) -> Read:
    """A prompt, a completion and a label, as TRL's unpaired preferences; no pair, but what objective kto reads."""
    columns = params.columns
    for name in (columns.completion, columns.label):
        if values.get(name) is None:
            raise BadForm(
                f"no column {name!r} (found {', '.join(map(repr, values))}); prepare.columns can name another"
            )
    completion, label = values[columns.completion], values[columns.label]
    if label not in (0, 1):
        raise BadForm(f"{columns.label} is {label!r}, expected true or false (or 1, 0)")
    row = FeedbackRow(asked(values, columns, completion), completion, bool(label))
    return [row], 0, {columns.completion, columns.label}


def _is_unpaired(values: Values, params: PrepareParams) -> bool:
    return values.get(params.columns.completion) is not None and values.get(params.columns.label) is not None


def _is_choice(values: Values, params: PrepareParams) -> bool:
    return any(values.get(name) is not None for name in choices.OPTIONS) and any(
        values.get(name) is not None for name in choices.ANSWERS
    )


def _never(values: Values, params: PrepareParams) -> bool:
    return False


# In the order in which auto tries them.
FORMS: dict[str, Form] = {
    "implicit_text": Form(_is_implicit, _implicit, "what chosen and rejected begin with is the prompt"),
    "pairs": Form(_has_pair, _pairs),
    "openai": Form(_with("input", "preferred_output", "non_preferred_output"), _openai),
    "swift": Form(
        lambda values, params: (
            any(values.get(name) is not None for name in ("rejected_response", "rejected_messages"))
            and any(values.get(name) is not None for name in ("messages", "response"))
        ),
        _swift,
        "messages or response is chosen, over rejected_response or rejected_messages",
    ),
    "alpaca_list": Form(
        lambda values, params: isinstance(values.get("output"), list) and bool(values["output"]),
        _alpaca_list,
        "the first of output over the second",
    ),
    **{name: _winner(name) for name in winners.PUBLISHED},
    "arena_55k": Form(_with(*winners.ARENA_55K), _arena_55k, "the response whose winner_model column is 1"),
    **{name: _list(name) for name in ranked.PUBLISHED},
    "multiple_choice": Form(_is_choice, _choices, "the right option over one wrong one (prepare.wrong_options: all)"),
    "unpaired": Form(_is_unpaired, _unpaired, "single responses that are desirable or not, for objective kto"),
    "preferred": Form(_never, _preferred),
    "ranked": Form(_never, _ranked),
}


def _unknown(values: Values, params: PrepareParams) -> str:
    """What a row without chosen and rejected is told; never a setting that could swap the two."""
    columns = params.columns
    missing = [repr(name) for name in (columns.chosen, columns.rejected) if name not in values]
    found = ", ".join(map(repr, values))
    tried = f"form {params.form}" + " (no form of docs/data.md has these columns)" * (params.form == "auto")
    return (
        f"no column {' or '.join(missing)} (found {found}); tried {tried}. Where one column always holds "
        "the better response and another the worse, name them in prepare.columns: {chosen: ..., rejected: ...}; where "
        "a column says which of two is better, set prepare.preferred; for a list of responses with scores, "
        "prepare.ranked"
    )
