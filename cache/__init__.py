"""The reference cache: the reference model's answers as content-addressed Parquet (see docs/cache-format.md)."""

from cache.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheLocked, CacheMismatch
from cache.identity import ReferenceIdentity
from cache.journal import Journal
from cache.key_set import Keys, KeySet, locate
from cache.keys import prompt_key, response_key
from cache.publish import RowSource, publish_reference, publish_rows
from cache.reference import Reference, open_reference
from cache.schema import FORMAT_VERSION, LOGPS_SCHEMA, check_logps, logps_table
from cache.verify import Finding, verify

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
    "RowSource",
    "check_logps",
    "locate",
    "logps_table",
    "open_reference",
    "prompt_key",
    "publish_reference",
    "publish_rows",
    "response_key",
    "verify",
]
