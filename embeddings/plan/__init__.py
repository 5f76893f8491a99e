"""Dry runs: does a model fit a cluster, how are its tables sharded, what will a step cost; no GPU, no process group."""
