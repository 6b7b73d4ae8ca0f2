"""Transformers models and tokenizers: opened whole and as their config says, their digests and limits."""
