"""Every check, in the order in which findings are listed."""

from __future__ import annotations

from typing import Final

from shardkit.ops.health import caches, poolers, postgres, replication, shards
from shardkit.ops.health.facts import Facts
from shardkit.ops.health.findings import Check, Finding, Severity

__all__ = ["CHECKS", "diagnose"]

CHECKS: Final[tuple[Check, ...]] = (
    *postgres.CHECKS,
    *replication.CHECKS,
    *shards.CHECKS,
    *poolers.CHECKS,
    *caches.CHECKS,
)

_ORDER = list(Severity)


def diagnose(facts: Facts) -> list[Finding]:
    """Return what all checks find, the worst first; possibly nothing."""
    found = [finding for check in CHECKS for finding in check.findings(facts)]
    return sorted(found, key=lambda finding: _ORDER.index(finding.severity))
