"""The parts of the cache protocol that are no state machine: keys, entries, rows, floors.

Pure. `shardkit.cache` has the machines; `shardkit.caches` the servers.
"""
