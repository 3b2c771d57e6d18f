"""Cache servers behind one protocol: Memcached, Redis, memory for tests, and none at all.

Each carries out what `shardkit.cache`'s machines ask, many requests in one round trip a server.
They never raise for a server's sake: a request without an answer is answered `UNKNOWN`.
"""
