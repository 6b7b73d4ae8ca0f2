"""Phase 1 on many machines: engines as Ray actors. Ray is imported here alone."""
