"""Pairs with their reference log-probs in the forms that other programs read."""
