"""What judges say: findings, and how much was looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["KEPT", "Finding", "Ref", "Verdict"]

Ref = tuple[str, int]
"""An operation: its process, its number there."""

KEPT: Final = 20
"""Findings of one name that are kept whole; the rest are counted."""

_ALLOWED: Final = "(allowed)"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that must not be, or that is worth knowing.

    Attributes:
        name: the kind of anomaly.
        summary: what happened, in one line.
        operations: whose lines to look at, in the order of the story.
        story: the reasoning, line by line.
        is_allowed: whether the level that was asked for permits it; it is reported, no more.
    """

    name: str
    summary: str
    operations: tuple[Ref, ...] = ()
    story: tuple[str, ...] = ()
    is_allowed: bool = False


@dataclass(slots=True)
class Verdict:
    """What one judge says.

    Attributes:
        judge: its name, from K1 to K11.
        promise: what has to hold.
        counts: how much was looked at. The first of them is vital: while it is zero, nothing was.
        is_concerned: whether the history has anything for this judge.
        findings: some of each name.
        totals: how many there were, by name.
        unchecked: what could not be checked, and why.
    """

    judge: str
    promise: str
    counts: dict[str, int] = field(default_factory=dict)
    is_concerned: bool = False
    findings: list[Finding] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)

    def found(
        self,
        name: str,
        summary: str,
        operations: Sequence[Ref] = (),
        story: Sequence[str] = (),
        *,
        is_allowed: bool = False,
    ) -> None:
        """Add a finding."""
        counted = f"{name} {_ALLOWED}" if is_allowed else name
        n = self.totals[counted] = self.totals.get(counted, 0) + 1
        if n <= KEPT:
            finding = Finding(name, summary, tuple(operations), tuple(story), is_allowed)
            self.findings.append(finding)

    @property
    def violations(self) -> int:
        """How many findings must not be."""
        return sum(n for name, n in self.totals.items() if not name.endswith(_ALLOWED))

    @property
    def has_checked(self) -> bool:
        """Whether anything that matters was looked at."""
        return next(iter(self.counts.values()), 0) > 0

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints of it."""
        return {
            "judge": self.judge,
            "promise": self.promise,
            "is_concerned": self.is_concerned,
            "has_checked": self.has_checked,
            "violations": self.violations,
            "counts": self.counts,
            "totals": self.totals,
            "unchecked": self.unchecked,
            "findings": [
                {
                    "name": each.name,
                    "summary": each.summary,
                    "is_allowed": each.is_allowed,
                    "operations": [list(ref) for ref in each.operations],
                    "story": list(each.story),
                }
                for each in self.findings
            ],
        }
