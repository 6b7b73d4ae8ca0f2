"""Sketches of per-response gradients: frozen hashes, sums, and the backward that collects them."""
