"""Models that are asked for more than the reference's log-probs: who they are, what they said, one engine for all."""
