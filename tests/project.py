"""A project as the stages leave it, and the commands that people type in it."""

from pathlib import Path

import click.testing
import polars as pl
import pytest

from cache import Journal, open_reference, shards
from pipeline.reference.identity import reference_identity
from stages.__main__ import main
from tests import ROOT
from tests.tiny import write_model, write_pairs, write_reference_cache

PARAMS = ROOT / "params.yaml"


class Project:
    """Prepared pairs, a model, what is published in `out`, and a place of its own for work in progress."""

    def __init__(self, root: Path, out: str = "logps") -> None:
        self.root, self.pairs, self.model, self.out = root, root / "pairs", root / "model", root / out
        self.home, self.metrics = root / "home", root / "metrics.json"

    def run(self, *words):
        return click.testing.CliRunner(env={"REFCACHE_HOME": str(self.home)}).invoke(main, list(map(str, words)))

    def command(self, *words, **options):
        """A command that wants pairs, model and params; options: more of them, or others."""
        named = {"--pairs": self.pairs, "--model": self.model, "--params": PARAMS} | options
        return self.run(*words, *(word for option in named.items() for word in option))

    def contents(self):
        return {path.name: path.read_bytes() for path in self.out.iterdir()}

    def shards(self):
        return sorted(self.out.glob("*.parquet"))

    def damage(self):
        """A flipped byte, a missing shard and a stray one; returns the keys of the rows that were hit."""
        flipped, missing, *_ = self.shards()
        lost = set(pl.read_parquet([flipped, missing], columns=["response_key"])["response_key"])
        content = bytearray(flipped.read_bytes())
        content[len(content) // 2] ^= 1
        flipped.write_bytes(content)
        missing.rename(self.out / "mine.parquet")
        return lost


class ScoredProject(Project):
    """One whose reference cache transformers filled, in several shards: what `write_project` made."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.identity = reference_identity(self.model, dtype="float32", quantization=None)

    def repair(self, **options):
        return self.command("verify", self.out, "--repair", **{"--metrics": self.metrics}, **options)

    def fill_journal(self):
        with Journal(self.home / "journal" / self.identity.reference_id) as journal:
            journal.append(open_reference(self.out, expect=self.identity).scan().collect().to_arrow())


def write_project(root: Path) -> Path:
    """Pairs, model and a sound reference cache in several shards; copy it and open it with `ScoredProject`."""
    write_model(root / "model")
    write_pairs(root / "pairs", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_ROWS", 6)
        write_reference_cache(root / "logps", root / "pairs", root / "model")
    return root
