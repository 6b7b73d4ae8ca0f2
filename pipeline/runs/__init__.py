"""Training jobs as the stages see them: start ranks, watch them, publish what they made."""
