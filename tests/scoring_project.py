"""Prepared pairs, a model, and a place for the journal and the reference cache, for tests of the score stage."""

from itertools import pairwise

import pyarrow as pa
import pytest

from cache import Journal, prompt_key, response_key
from pipeline.data.tables import PAIRS_SCHEMA, RESPONSES_SCHEMA, write_table
from pipeline.params import ScoreParams, SketchParams
from pipeline.reference.identity import reference_identity
from pipeline.reference.responses import Responses
from pipeline.reference.scoring import score_responses
from pipeline.reference.sketching import sketch_responses
from pipeline.tokens.view import open_token_view
from tests.project import Project

PARAMS = ScoreParams(enforce_eager=True, rows_per_call=6, drift_sample=8)
SKETCH = SketchParams(mode="tensorsketch", source="engine", k=64, audit=32)


def write_prepared(folder, rows):
    """Prepared pairs whose responses are `rows`; a pair for every two responses of a prompt that follow each other."""
    responses, pairs = [], []
    for index, (prompt, response) in enumerate(rows):
        responses.append(
            {
                "response_key": response_key(prompt, response),
                "prompt_key": prompt_key(prompt),
                "split": "train" if index % 3 else "test",
                "prompt_ids": prompt,
                "response_ids": response,
                "truncated": False,
                "prompt_text": "",
                "response_text": "",
                "reward": None,
            }
        )
    for chosen, rejected in pairwise(responses):
        if chosen["prompt_key"] == rejected["prompt_key"]:
            pairs.append(
                {name: chosen[name] for name in ("split", "prompt_key", "prompt_text")}
                | {"chosen_key": chosen["response_key"], "rejected_key": rejected["response_key"]}
                | {"pair_id": len(pairs), "category": None, "chosen_text": "", "rejected_text": ""}
                | {"chosen_reward": None, "rejected_reward": None, "source": f"rows:{len(pairs)}"}
            )
    write_table(pa.Table.from_pylist(pairs, PAIRS_SCHEMA), folder / "pairs.parquet", PAIRS_SCHEMA)
    write_table(pa.Table.from_pylist(responses, RESPONSES_SCHEMA), folder / "responses.parquet", RESPONSES_SCHEMA)
    return folder


def open_responses(folder, scratch):
    """The prepared pairs in a folder as stages see them; the token view goes to $REFCACHE_HOME."""
    return Responses([open_token_view(folder)], scratch)


class ScoringProject(Project):
    """Pairs of these rows, a model, and nothing scored yet."""

    def __init__(self, root, model, rows):
        super().__init__(root)
        self.model, self.rows, self.sketches = model, rows, root / "sketches"
        write_prepared(self.pairs, rows)

    def score(self, pairs=None, **changes):
        options = {"params": PARAMS, "trainer_dtype": "float32"} | changes
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REFCACHE_HOME", str(self.home))
            return score_responses(
                pairs=pairs or self.pairs, model=self.model, out=self.out, metrics=self.metrics, **options
            )

    def sketch(self, pairs=None):
        """Sketch the head, by the engine."""
        paths = {"pairs": pairs or self.pairs, "model": self.model, "out": self.sketches}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REFCACHE_HOME", str(self.home))
            return sketch_responses(
                **paths, metrics=self.root / "sketch.json", params=SKETCH, trainable="all", score=PARAMS
            )

    def journalled(self):
        identity = reference_identity(self.model, dtype=PARAMS.dtype, quantization=PARAMS.quantization)
        with Journal(self.home / "journal" / identity.reference_id) as journal:
            return journal.keys()
