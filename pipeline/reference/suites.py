"""The responses of preference suites beside those of the pairs: scored in the same run, published apart.

Apart, so that a new suite changes no byte of what policies are trained against, and retrains none.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cache import KeySet, RowSource, StoredRows
from cache.identity import Identity
from pipeline.data.suites import suite_folders
from pipeline.reference.publication import publish_needed, sound_reference
from pipeline.reference.responses import Responses, Wanted, first_of_each
from pipeline.reference.unscorable import Folders
from pipeline.tokens.view import open_token_view


class SuiteResponses:
    """The distinct responses of all suites in the prepared folder `suites`, and their publication `out`.

    None for both: there are no suites, and nothing is published. keys: theirs, mapped. scratch: a folder for temporary
    files, for as long as this object is used. Raises RequestError where `suites` was not prepared.
    """

    def __init__(self, suites: Path | None, out: Path | None, scratch: Path) -> None:
        self.outs = [] if out is None else [out]
        prepared = {} if suites is None else suite_folders(suites)
        self.folders: Folders = {f"suite {name} ": folder for name, folder in prepared.items()}
        self._rows = Responses([open_token_view(folder) for folder in prepared.values()], scratch)
        self.keys = self._rows.key_set()

    def besides(self, pairs: KeySet) -> Wanted:
        """Those that are not among `pairs`, none of them to be sketched.

        Asked for in calls of their own, after the pairs' rows, so that these lie in the same batches with and without
        suites, and get the same numbers also where numbers depend on the batch.
        """
        own = self._rows.without(first_of_each(self._rows.table.keys), pairs)
        return Wanted(self._rows, own, among=own, sketched=np.zeros(len(own), np.bool_))

    def published(self, identity: Identity) -> list[StoredRows]:
        """What is sound of the earlier publication."""
        found = [sound_reference(out, identity) for out in self.outs]
        return [stored for stored in found if stored is not None]

    def publish(self, sources: Sequence[RowSource], identity: Identity) -> None:
        """Make the publication hold exactly the suites' rows, from the first of `sources` that has each."""
        for out in self.outs:
            publish_needed(out, self.keys, sources, identity)
