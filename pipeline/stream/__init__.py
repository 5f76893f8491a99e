"""User-history shards to batches: petastorm reads, numpy cuts; an epoch is a pure function of its seed."""
