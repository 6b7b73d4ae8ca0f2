"""The page template of `dvc plots show`, made as setup makes it."""

import subprocess
import sys

import pytest

from tests import ROOT


@pytest.mark.slow
def test_the_command_of_setup_writes_a_template_that_loads_nothing(tmp_path):
    page = tmp_path / "plots" / "offline.html"
    subprocess.run([sys.executable, "-m", "pipeline.report.vega", str(page)], cwd=ROOT, check=True)
    text = page.read_text()
    assert "{plot_divs}" in text and "@BUNDLE@" not in text and len(text) > 500_000
    assert "<script src" not in text and text.count("</script>") == 2
