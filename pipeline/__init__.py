"""The computations of the two phases, one module per idea."""
