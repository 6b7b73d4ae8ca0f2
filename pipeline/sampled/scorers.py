"""What a sampled answer is worth by its text alone, as a number; the reward model's scores are not made here."""

import importlib
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pipeline.errors import RequestError
from pipeline.params.sampling import SampleParams
from pipeline.sampled.final_answer import final_answer
from pipeline.sampled.math_equality import MathEquality, need_math_verify


class Asked(NamedTuple):
    """One sampled answer; text and reference without end-of-turn tokens. reference: an answer known to be right."""

    prompt: str
    text: str
    reference: str | None


Scorer = Callable[[Sequence[Asked]], list[float]]  # (n answers) -> n finite scores, more is better


def text_scorer(params: SampleParams) -> Scorer:
    """The scorer that params.scorer names: math, exact, regex or function.

    math, exact and regex give 1.0 (right) or 0.0, and raise RequestError for an answer without a reference. Raises
    RequestError at once where a package or a function can't be imported, and ValueError for none and reward_model.
    """
    if params.scorer == "math":
        need_math_verify()
        return _math
    if params.scorer == "exact":
        return _exact
    if params.scorer == "regex" and params.pattern is not None:
        return _matching(re.compile(params.pattern))
    if params.scorer == "function" and params.function is not None:
        return _calling(params.function)
    raise ValueError(f"scorer {params.scorer} does not score by the text alone")


def _math(answers: Sequence[Asked]) -> list[float]:
    """Starts a process for all of them, so best given many at a time.

    Only final answers are compared: of a whole text math-verify picks one number among those on the way, and a wrong
    solution may pass for right.
    """
    references = [final_answer(_reference(asked, "math")) for asked in answers]
    with MathEquality() as equal:
        return [_math_score(equal, asked.text, reference) for asked, reference in zip(answers, references, strict=True)]


def _math_score(equal: MathEquality, text: str, reference: str | None) -> float:
    found = final_answer(text)
    return float(found is not None and reference is not None and equal(found, reference))


def _exact(answers: Sequence[Asked]) -> list[float]:
    return [float(asked.text.split() == _reference(asked, "exact").split()) for asked in answers]


def _matching(pattern: re.Pattern[str]) -> Scorer:
    def last(text: str) -> str | None:
        found = [match[1] for match in pattern.finditer(text)]
        return found[-1].strip() if found and found[-1] is not None else None

    def score(asked: Asked) -> float:
        expected, found = last(_reference(asked, "regex")), last(asked.text)
        return float(found is not None and found == expected)

    return lambda answers: [score(asked) for asked in answers]


def _calling(entry_point: str) -> Scorer:
    function = _imported(entry_point)
    third = _third_parameter(function)

    def score(asked: Asked) -> float:
        more: tuple[str, ...] = ()
        if third == "required":
            more = (_reference(asked, f"function {entry_point}"),)
        elif third == "optional" and asked.reference is not None:
            more = (asked.reference,)
        try:
            value = function(asked.prompt, asked.text, *more)
        except Exception as error:
            raise RequestError(
                f"sample.function {entry_point} raised {type(error).__name__}: {error}, for an answer to the prompt "
                f"{_shown(asked.prompt)}; expected a finite number. No scores were kept. Mend the function, then run "
                "again."
            ) from error
        return _finite(value, entry_point, asked)

    return lambda answers: [score(asked) for asked in answers]


def _imported(entry_point: str) -> Callable[..., Any]:
    module_name, _, name = entry_point.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module does as it is imported
        raise RequestError(
            f"sample.function {entry_point}: importing {module_name} raised {type(error).__name__}: {error}; nothing "
            "was scored. Install its package, or set PYTHONPATH to the folder that holds it."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = f"has {name} = {function!r}, which can't be called" if hasattr(module, name) else f"has no {name}"
        raise RequestError(
            f"sample.function {entry_point}: {module.__file__ or module_name} {found}; expected a function of "
            "(prompt, text) or (prompt, text, reference). Nothing was scored. Correct sample.function or the module."
        )
    result: Callable[..., Any] = function
    return result


def _third_parameter(function: Callable[..., Any]) -> str:
    """ "none", "optional" or "required": whether `function` takes a third positional argument."""
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except ValueError:  # some built-in functions have no signature
        return "none"
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return "optional"
    places = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if len(places) < 3:
        return "none"
    return "required" if places[2].default is inspect.Parameter.empty else "optional"


def _finite(value: Any, entry_point: str, asked: Asked) -> float:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RequestError(
            f"sample.function {entry_point} returned {value!r} for an answer to the prompt {_shown(asked.prompt)}; "
            "expected a finite number. No scores were kept. Mend the function, then run again."
        )
    return number


def _reference(asked: Asked, scorer: str) -> str:
    if asked.reference is None:
        raise RequestError(
            f"sample.scorer: {scorer} compares with a reference answer, and the prompt {_shown(asked.prompt)} has "
            "none. No scores were kept. Give each row of sample.files an answer, or choose reward_model or a "
            "function of (prompt, text)."
        )
    return asked.reference


def _shown(prompt: str) -> str:
    return repr(textwrap.shorten(prompt, 100, placeholder=" ...") if prompt.split() else prompt)
