"""Moves of logical shards: who may own what, and how it changes hands. Source: docs/moves.md."""
