"""vLLM in a process of its own: backends, their check at start-up, supervision."""
