"""What other programs import from this project: `refcache.lookup` and, beside TRL, `refcache.trl`."""
