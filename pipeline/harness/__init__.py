"""Benchmark tasks of lm-evaluation-harness, asked of models through their journals."""
