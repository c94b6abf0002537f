"""Score models: how to read a network, and exact models with known scores."""
