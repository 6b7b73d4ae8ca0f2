"""Where each loss leads, over the probabilities of a chosen and a rejected response."""
