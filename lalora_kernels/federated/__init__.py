"""Federated training of adapters, each client's records under their own differential privacy."""
