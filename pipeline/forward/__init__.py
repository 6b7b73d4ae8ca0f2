"""Token ids -> log-probs of responses: how a batch lies in memory, kernels, output head."""
