"""Three bytes an entry: a map from dense ids to ids, packed into strings of Redis (docs/idmap.md).

    owners = IdMap(redis.Redis(), "photos")
    owners.load(pairs)              # millions a minute, sorted by id
    owners.get(1_155_315)           # one round trip; None when the map has no such id

For ids that say nothing by themselves: those of before the ids that carry their logical shard.
"""

from shardkit.idmap.async_map import AsyncIdMap
from shardkit.idmap.building import Loaded
from shardkit.idmap.checking import Found
from shardkit.idmap.layout import MAX_ID, MAX_VALUE, Layout
from shardkit.idmap.map import IdMap

__all__ = ["MAX_ID", "MAX_VALUE", "AsyncIdMap", "Found", "IdMap", "Layout", "Loaded"]
