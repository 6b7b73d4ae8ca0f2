"""Token ids of a prepared folder, memory-mapped."""
