"""The final answer of a worked solution, as GSM8K and chain-of-thought texts write it."""

import re

_CALCULATION = re.compile(r"<<[^\n]*?>>")  # GSM8K's calculator notes, <<6*7=42>>: numbers on the way
_MARKED = re.compile(r"(?<!#)####(?!#)([^\n]*)")
_BOX = re.compile(r"\\boxed\s*\{")
_SAID = re.compile(r"\banswer\s*(?:is\b\s*:?|\**\s*:)\s*(.*?)(?=[.!?](?:[\s*]|$)|\n|$)", re.IGNORECASE)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+(?!\w))?|\.\d+"
# A minus is a sign only where nothing stands before it that something could be taken from.
_NUMBER = re.compile(rf"(?:(?<![\w.)\]])-)?(?:\\?\$)?(?<![\w.])(?:{_DIGITS})(?:/\d+(?!\w))?(?:\\?%)?")
_SEPARATED = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_SEVERAL = re.compile(r"[(\[{]")  # in pairs, intervals and sets a comma separates members


def final_answer(text: str) -> str | None:
    """What `text` ends up saying, or None where it has neither a marked answer nor a number.

    The last `#### x` line; else the content of the last closed \\boxed{...}; else what follows the last "answer is" or
    "answer:", up to the end of its sentence; else the last number. A `####` with a box after it is a heading.
    Calculator notes, thousands separators, a leading $, signs of emphasis and a trailing full stop are left out.
    """
    text = _CALCULATION.sub("", text.replace("\u2212", "-"))  # a typographic minus
    box, box_start = _last_box(text)
    marks = [found for found in _MARKED.finditer(text) if found.start() > box_start]
    said = [*(found[1] for found in reversed(marks)), box, *(found[1] for found in reversed([*_SAID.finditer(text)]))]
    for answer in filter(None, map(_plain, said)):
        return answer
    numbers = _NUMBER.findall(text)
    return _plain(numbers[-1]) if numbers else None


def _last_box(text: str) -> tuple[str, int]:
    """Content and start of the last \\boxed{...} that is closed; ("", -1) where there is none."""
    for box in reversed([*_BOX.finditer(text)]):
        depth, at = 1, box.end()
        while at < len(text):
            if text[at] == "\\":  # \{ and \} are braces on paper
                at += 1
            elif text[at] in "{}":
                depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return text[box.end() : at], box.start()
            at += 1
    return "", -1


def _plain(answer: str) -> str:
    answer = " ".join(answer.split()).strip("*_ ")
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        answer = answer.removeprefix(opening).removesuffix(closing).strip()
    answer = answer.removesuffix(".").removesuffix("$").removesuffix(".").strip("* ")
    answer = re.sub(r"^(-?)\\?\$+\s*", r"\1", answer)
    answer = re.sub(r"(?<=\d)\{,\}(?=\d{3})", ",", answer)  # LaTeX's separator without the space after it
    if not _SEVERAL.search(answer):
        answer = _SEPARATED.sub(lambda found: found[0].replace(",", ""), answer)
    return answer
