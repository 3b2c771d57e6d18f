"""What a migration's SQL may not contain, as pure rules, one function each.

Two kinds. Promises protect the runner itself, hold everywhere and cannot be set aside:
`check`. Hazards are what hurts people who use the tables: `examine`. Which of those count is
decided when the revision meets a database (`shardkit.ops.guard`), for a table that is empty or
small bears what a large one does not. Rules read PostgreSQL's own parse tree and never a database.

The table of rules, squawk's and strong_migrations' counterparts of each, is in docs/migrations.md.
"""

from __future__ import annotations

from shardkit.ops.safety import advice, compatibility, locks, promises, rewrites
from shardkit.ops.safety.rules import Finding, Rule, check, examine, rules

__all__ = ["Finding", "Rule", "check", "examine", "rules"]
