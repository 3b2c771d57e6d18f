"""Failover: another server of a physical shard becomes its primary. See `machine`."""
