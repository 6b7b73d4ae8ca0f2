"""Answers sampled from the reference: what each one is worth, and which two of a prompt make a pair."""
