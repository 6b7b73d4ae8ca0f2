"""The reference cache: the reference model's answers as content-addressed Parquet (see docs/cache-format.md)."""

from cache.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheLocked, CacheMismatch
from cache.identity import ReferenceIdentity
from cache.journal import Journal
from cache.keys import prompt_key, response_key
from cache.publish import publish_reference
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
    "Reference",
    "ReferenceIdentity",
    "check_logps",
    "logps_table",
    "open_reference",
    "prompt_key",
    "publish_reference",
    "response_key",
    "verify",
]
