"""Raw logs to user-history shards: one definition in Ibis, run by an embedded or a distributed engine."""
