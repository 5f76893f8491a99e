"""Dry runs: whether a model fits a cluster, how its tables are sharded, what a step costs; no GPU is needed."""
