"""Taking one's data along, and the end of an account on every shard, cache and disk."""
