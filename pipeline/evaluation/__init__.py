"""A trained policy against the reference, on held-out pairs and on its own answers."""
