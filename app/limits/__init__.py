"""How often who may ask: token buckets in Redis, for every server process together."""
