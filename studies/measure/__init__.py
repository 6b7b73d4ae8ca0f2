"""What studies measure of trained policies beside `evaluate`: log-probs, divergence, answers."""
