"""The peak of a process against what it holds itself, whoever started it."""

import subprocess
import sys

from tests import ROOT

HELD = 400 << 20


def peak_of_a_child(code):
    program = f"from pipeline.training.record import peak_bytes\n{code}\nprint(peak_bytes())"
    return int(subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True).stdout)


def test_what_the_parent_holds_is_not_the_childs():
    held = b"x" * HELD
    assert peak_of_a_child("") < HELD / 2
    assert len(held) == HELD


def test_what_was_freed_again_counts():
    assert HELD < peak_of_a_child(f"held = b'x' * {HELD}; del held") < 1.5 * HELD
