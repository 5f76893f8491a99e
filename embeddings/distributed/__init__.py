"""Rows and messages between ranks: collectives, row-wise shards, lookups in them, the process group."""
