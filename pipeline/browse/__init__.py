"""Pairs and the reference's log-probs of them as a folder of pages to look through, offline."""
