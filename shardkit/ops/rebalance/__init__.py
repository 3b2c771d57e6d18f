"""Rebalancing: which logical shards to move where, so that the fewest bytes travel.

`measure` asks the servers, `planner` decides (pure), `planfile` keeps the decision, and `apply`
hands it to the mover. Source: docs/rebalance.md.
"""
