"""The reference cache: the reference model's answers as content-addressed Parquet (see docs/cache-format.md)."""

from cache.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheLocked, CacheMismatch
from cache.identity import ReferenceIdentity
from cache.joining import join_rows, join_sum_logps, key_batches, require_keys
from cache.journal import Journal
from cache.key_set import Keys, KeySet, key_bytes, locate
from cache.keys import prompt_key, response_key
from cache.publish import RowSource, publish_reference, publish_rows
from cache.reference import Reference, StoredRows, open_reference
from cache.schema import FORMAT_VERSION, LOGPS_SCHEMA, check_logps, logps_table
from cache.sketches import Sketches, SketchIdentity, open_sketches
from cache.verify import Finding, verify
from cache.view import ReferenceView, ViewRows, open_view, remove_views

__all__ = [
    "FORMAT_VERSION",
    "LOGPS_SCHEMA",
    "CacheCorrupt",
    "CacheError",
    "CacheIncomplete",
    "CacheLocked",
    "CacheMismatch",
    "Finding",
    "Journal",
    "KeySet",
    "Keys",
    "Reference",
    "ReferenceIdentity",
    "ReferenceView",
    "RowSource",
    "SketchIdentity",
    "Sketches",
    "StoredRows",
    "ViewRows",
    "check_logps",
    "join_rows",
    "join_sum_logps",
    "key_batches",
    "key_bytes",
    "locate",
    "logps_table",
    "open_reference",
    "open_sketches",
    "open_view",
    "prompt_key",
    "publish_reference",
    "publish_rows",
    "remove_views",
    "require_keys",
    "response_key",
    "verify",
]
