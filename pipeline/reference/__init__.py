"""Filling the reference cache: score, sketch, publish, and measure drift."""
