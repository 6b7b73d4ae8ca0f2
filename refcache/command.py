"""The console script `refcache`. Unlike `python -m stages` it does not look into the working folder for packages."""

import sys
from pathlib import Path

from refcache.packages import ForeignPackage, check_packages


def main() -> None:
    """Run the command line; exit code 2 where another package has the name of one of ours."""
    try:
        check_packages()
    except ForeignPackage as error:
        sys.exit(_refusal(error))
    # For modules of the project's own, as sample.function names one. Last, so that none of them hides a package.
    sys.path.append(str(Path.cwd()))
    from stages.__main__ import main as commands

    commands(prog_name="refcache")


def _refusal(error: ForeignPackage) -> int:
    print(f"Error: {error}", file=sys.stderr)
    return 2
