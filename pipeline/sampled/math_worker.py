"""math-verify in a process of its own: two final answers a line in, whether they are equal a line out.

math-verify limits its time by signals that Python handles, which works in a main thread alone and never inside one long
operation on integers: an answer can hold the stage for ever. Here the system's alarm, which nobody
handles, ends the process instead.
"""

import json
import logging
import re
import resource
import signal
import sys

SECONDS = 10
READY = "ready\n"
_BYTES = 2 << 30  # of address space; beyond, sympy's MemoryError is "not equal"
# 24 apples, 3.5 square metres; but neither 2 x, nor 5 million.
_NO_UNIT = "hundred|thousand|[mb]illion|trillion|dozen|and|or|to|plus|minus|times"
_MEASURED = re.compile(rf"(-?[\d.]+(?:/\d+)?)(?: (?!(?:{_NO_UNIT})\b)[a-z]{{2,}})+")


def as_math(answer: str) -> str:
    """`answer` as math-verify should read it: a formula as a whole, a number with a unit as the number."""
    measured = _MEASURED.fullmatch(answer)
    # Without the dollars math-verify reads no variables, and takes one number out of several.
    return f"${measured[1] if measured else answer.replace('$', '')}$"


def equal(answer: str, reference: str) -> bool:
    """Whether math-verify takes two final answers for equal. No limit of time."""
    from math_verify import parse, verify

    gold, found = (parse(as_math(text), parsing_timeout=None) for text in (reference, answer))
    return bool(verify(gold, found, timeout_seconds=None))


def main(seconds: int) -> None:
    logging.disable()  # math-verify warns of the time limits that are off
    equal("1", "1.0")  # imports, and builds the parser
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the stage's to handle; it ends this process
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    print(READY, end="", flush=True)
    for line in sys.stdin:
        answer, reference = json.loads(line)
        signal.alarm(seconds)
        found = equal(answer, reference)
        signal.alarm(0)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
