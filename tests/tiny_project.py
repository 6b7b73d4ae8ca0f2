"""A whole project of a few prompts whose reference cache transformers filled, and the commands that people type."""

from pathlib import Path

import click.testing
import polars as pl
import pytest

from cache import Journal, open_reference, shards
from pipeline.reference.identity import reference_identity
from stages.__main__ import main
from tests import ROOT
from tests.tiny import write_pairs, write_reference_cache
from tests.tiny_reference import write_model

PARAMS = ROOT / "params.yaml"


class Project:
    def __init__(self, root: Path) -> None:
        self.root, self.pairs, self.model, self.out = root, root / "pairs", root / "model", root / "logps"
        self.home, self.metrics = root / "home", root / "metrics.json"
        self.identity = reference_identity(self.model, dtype="float32", quantization=None)

    def run(self, command, *arguments, **options):
        paths = {"--pairs": self.pairs, "--model": self.model, "--params": PARAMS} | options
        return self.run_plain(command, *arguments, *(word for option in paths.items() for word in option))

    def run_plain(self, *words):
        return click.testing.CliRunner(env={"REFCACHE_HOME": str(self.home)}).invoke(main, list(map(str, words)))

    def repair(self, **options):
        return self.run("verify", self.out, "--repair", **{"--metrics": self.metrics}, **options)

    def contents(self):
        return {path.name: path.read_bytes() for path in self.out.iterdir()}

    def shards(self):
        return sorted(self.out.glob("*.parquet"))

    def fill_journal(self):
        with Journal(self.home / "journal" / self.identity.reference_id) as journal:
            journal.append(open_reference(self.out, expect=self.identity).scan().collect().to_arrow())

    def damage(self):
        """A flipped byte, a missing shard and a stray one; returns the keys of the rows that were hit."""
        flipped, missing, *_ = self.shards()
        lost = set(pl.read_parquet([flipped, missing])["response_key"])
        content = bytearray(flipped.read_bytes())
        content[len(content) // 2] ^= 1
        flipped.write_bytes(content)
        missing.rename(self.out / "mine.parquet")
        return lost


def write_project(root: Path) -> Path:
    """Pairs, model and a sound reference cache in several shards; copy it and open it with `Project`."""
    write_model(root / "model")
    write_pairs(root / "pairs", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_ROWS", 6)
        write_reference_cache(root / "logps", root / "pairs", root / "model")
    return root
