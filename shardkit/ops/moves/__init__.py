"""Moves of logical shards: who may own what, and how it changes hands. Source: docs/moves.md."""

from __future__ import annotations

from shardkit.ops.moves.batch import move_many
from shardkit.ops.moves.driver import Outcome
from shardkit.ops.moves.planning import NOTICE, MovePlan, Options, plan, revised
from shardkit.ops.moves.rows import Diff
from shardkit.ops.moves.run import abort, clean, move, resume, rollback, status, verify
from shardkit.ops.moves.work import Report, Script

__all__ = [
    "NOTICE",
    "Diff",
    "MovePlan",
    "Options",
    "Outcome",
    "Report",
    "Script",
    "abort",
    "clean",
    "move",
    "move_many",
    "plan",
    "resume",
    "revised",
    "rollback",
    "status",
    "verify",
]
