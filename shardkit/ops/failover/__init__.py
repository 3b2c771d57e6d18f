"""Failover: another server of a physical shard becomes its primary.

`machine` decides, `nodes` and `hosts` do, `driver` brings them together, `run` has the functions
for others. Source: docs/failover.md.
"""

from shardkit.ops.failover.run import Done, adopt, fail_over, list_lost, plan, watch

__all__ = ["Done", "adopt", "fail_over", "list_lost", "plan", "watch"]
