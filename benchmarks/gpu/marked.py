"""Part `tests`: pytest -m gpu, test by test."""

import importlib.util
from typing import Any

from benchmarks.gpu.child import ROOT, emit, parse, skip


class Outcomes:
    """A pytest plugin that says how each test ended."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = "" if report.passed else str(report.longrepr)[-1500:]
            print()  # pytest's dots have no line of their own
            emit("test", name=report.nodeid, outcome=report.outcome, seconds=report.duration, reason=reason)


def main() -> int:
    parse(__doc__)
    absent = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if absent:
        skip(f"{' and '.join(absent)} not installed")
        return 0
    import pytest

    # -s: or pytest would keep our results for itself.
    return int(pytest.main(["-m", "gpu", "-q", "-s", "-p", "no:cacheprovider", str(ROOT / "tests/gpu")], [Outcomes()]))


if __name__ == "__main__":
    raise SystemExit(main())
