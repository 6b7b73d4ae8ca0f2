"""The responses of preference suites beside those of the pairs: scored in the same run, published apart.

Apart, so that a new suite changes no byte of what policies are trained against, and retrains none.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import polars as pl

from cache import RowSource, StoredRows
from cache.identity import Identity
from pipeline.data.suites import suite_folders
from pipeline.data.tables import read_responses
from pipeline.engine.rows import ROW_COLUMNS, scoring_order
from pipeline.reference.publication import publish_needed, sound_reference
from pipeline.reference.unscorable import Folders


class SuiteResponses:
    """The distinct responses of all suites in the prepared folder `suites`, and their publication `out`.

    None for both: there are no suites, and nothing is published. Raises RequestError where `suites` was not prepared.
    """

    def __init__(self, suites: Path | None, out: Path | None) -> None:
        self.outs = [] if out is None else [out]
        prepared = {} if suites is None else suite_folders(suites)
        self.folders: Folders = {f"suite {name} ": folder for name, folder in prepared.items()}
        tables = [read_responses(folder).select(ROW_COLUMNS) for folder in prepared.values()]
        self._rows = pl.concat(tables).unique("response_key", maintain_order=True) if tables else None
        self.keys: set[bytes] = set() if self._rows is None else set(self._rows["response_key"])

    def after(self, rows: pl.DataFrame, column: str) -> pl.DataFrame:
        """`rows`, then in the order of scoring those that are not among them; `column` says which are which.

        In calls of their own, so that the pairs' rows lie in the same batches with and without suites, and get the same
        numbers also where these depend on the batch. Columns that only the pairs' rows have are false.
        """
        rows = rows.with_columns(pl.lit(False).alias(column))
        if self._rows is None:
            return rows
        own = scoring_order(self._rows.join(rows, on="response_key", how="anti"))
        more = [pl.lit(name == column).alias(name) for name in rows.columns if name not in ROW_COLUMNS]
        return pl.concat([rows, own.with_columns(more).select(rows.columns)])

    def published(self, identity: Identity, unknown: Collection[bytes]) -> list[StoredRows]:
        """What is sound of the earlier publication, where some row is known from nowhere else."""
        found = [sound_reference(out, identity) for out in self.outs] if unknown else []
        return [stored for stored in found if stored is not None]

    def publish(self, sources: Sequence[RowSource], identity: Identity) -> None:
        """Make the publication hold exactly the suites' rows, from the first of `sources` that has each."""
        for out in self.outs:
            publish_needed(out, self.keys, sources, identity)
