"""The example of docs/trl.md runs as it stands."""

import json
import re

import pytest

pytest.importorskip("trl", reason="TRL is not installed (pip install -e '.[bench]')")
pytestmark = pytest.mark.slow

from tests import ROOT  # noqa: E402

HERE = 'output_dir="models/trl", max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, bf16=False'


def test_the_example_trains_on_the_cache(place, tmp_path, monkeypatch):
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trl.md").read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    links = {
        "models/reference": place.model,
        "data/reference/logps": place.cache,
        "data/prepared/tokenizer": place.model,
    }
    for link, target in links.items():
        (tmp_path / link).parent.mkdir(parents=True)
        (tmp_path / link).symlink_to(target)
    (tmp_path / "data" / "input").mkdir()
    lines = (json.dumps(row) for row in place.pairs)
    (tmp_path / "data" / "input" / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    names = {}
    exec(example.replace('output_dir="models/trl"', HERE), names)
    assert names["trainer"].state.global_step == 2
