"""`shardkit doctor`: looks at the settings of every node and says what is wrong and what to do.

All nodes are asked at the same time and until a deadline; one that does not answer is a finding.
Called by the command line; changes nothing. What is asked is `shardkit.ops.health.collect`, what
is found the checks of `shardkit.ops.health.registry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shardkit.config import Config
from shardkit.ops.health.collect import collect
from shardkit.ops.health.facts import Expected, Facts
from shardkit.ops.health.findings import Finding, Severity
from shardkit.ops.health.registry import CHECKS, diagnose
from shardkit.topology import Topology

__all__ = ["Diagnosis", "examine"]

TIMEOUT: Final = 10.0
"""Seconds that all nodes together have to answer."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found.

    Attributes:
        findings: the worst first; possibly none.
        facts: what they were made of.
        n_checks: how many checks were made.
    """

    findings: tuple[Finding, ...]
    facts: Facts
    n_checks: int = len(CHECKS)

    def count(self, severity: Severity) -> int:
        """Return how many findings are of one severity."""
        return sum(finding.severity is severity for finding in self.findings)

    @property
    def is_healthy(self) -> bool:
        """Whether no finding is an error."""
        return not self.count(Severity.ERROR)


def examine(
    config: Config, topology: Topology, *, timeout: float = TIMEOUT, processes: int = 1
) -> Diagnosis:
    """Ask every node and check what it answers.

    Args:
        config: the file.
        topology: made of it.
        timeout: seconds that all nodes have to answer, above 0; what needs several of them is
            looked at for as long again.
        processes: programs that use the cluster at the same time, 1 or more.
    """
    expected = Expected(
        topology,
        pool=config.pool.size + config.pool.overflow,
        prepares=config.pool.prepare_statements,
        processes=processes,
        confirming=config.durability.confirming,
    )
    facts = collect(config, expected, timeout=timeout)
    return Diagnosis(tuple(diagnose(facts)), facts)
