"""What a check is and what it finds.

A check is one pure function from collected facts to problems. Its severity and its remedy belong
to the check, not to the place, so they can be listed: `docs/doctor.md` is that list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from shardkit.ops.health.facts import Facts

__all__ = ["Check", "Finding", "Look", "Problem", "Severity", "check"]


class Severity(StrEnum):
    """How bad a finding is.

    `error`: data can be lost, or something does not work now. `warning`: it will, under load, after
    a crash or on the day of a move. `note`: worth knowing.
    """

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        check: name of the check that found it.
        severity: how bad it is.
        where: the server, physical shard or file.
        message: what is wrong, in one line.
        remedy: what to do, in one line.
    """

    check: str
    severity: Severity
    where: str
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Problem:
    """What a check yields.

    Attributes:
        where: the server, physical shard or file.
        message: what is wrong there.
        remedy: what to do there, where it is more than the check says for everywhere.
    """

    where: str
    message: str
    remedy: str | None = None


Look = Callable[[Facts], Iterator[Problem]]


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Attributes:
        name: by which it is known, unique.
        severity: of all that it finds.
        remedy: what to do.
        about: what it looks for, in one line; the first of the function's docstring.
        look: the function.
    """

    name: str
    severity: Severity
    remedy: str
    about: str
    look: Look

    def findings(self, facts: Facts) -> Iterator[Finding]:
        """Yield what is found."""
        for problem in self.look(facts):
            remedy = problem.remedy or self.remedy
            yield Finding(self.name, self.severity, problem.where, problem.message, remedy)


def check(severity: Severity, remedy: str) -> Callable[[Look], Check]:
    """Make a check of a function, which keeps its name with `-` for `_`.

    Args:
        severity: of all that it finds.
        remedy: what to do.
    """

    def decorate(look: Look) -> Check:
        about = (look.__doc__ or "").strip().splitlines()[0].rstrip(".")
        return Check(look.__name__.replace("_", "-"), severity, remedy, about, look)

    return decorate
