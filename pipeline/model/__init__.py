"""Transformers folders: loading, saving, digests, tokenizer, what trains, and what a model can take."""
