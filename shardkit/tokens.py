"""Tokens: the log positions that a reader must have seen, as values and as text.

A commit makes one, a reader is given one, `merge` joins any number. A token is a set of marks: on
that server (system identifier), on that timeline, up to that log position, for those logical
shards. A position alone would compare as "caught up" on another server after a move, and on
another timeline after a failover. Pure: nothing here opens a connection. Text that cannot be read
asks the primaries: a reader may be slower, never staler.

The text, at most `LONGEST` characters that are safe in URLs, cookies and headers, numbers in
hexadecimal:

    token   = "0"                      ; ask the primaries
            | "1"                      ; nothing needs to be seen
            | "1" 1*( "~" mark ) "~" check
    mark    = system "." timeline "." epoch "." position [ "." shards ]
    shards  = range *( "_" range )     ; none: every logical shard of that server
    range   = shard [ "-" shard ]
    check   = 8 digits                 ; CRC-32 of all before it, so that a part is no token

Source: docs/replicas.md.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from shardkit.topology import MAX_LOGICAL_SHARDS

__all__ = [
    "ASK_PRIMARIES",
    "LONGEST",
    "NOTHING",
    "ONLY_PRIMARY",
    "Mark",
    "Need",
    "Token",
    "both",
    "covers",
    "joined",
    "merge",
    "mint",
    "parse",
]

LONGEST: Final = 3584
"""Characters of the longest token. With its signature, name and attributes it fits the 4,096
bytes that browsers allow a cookie. Source: RFC 6265, section 6.1."""

ASK_PRIMARIES: Final = "0"
"""The token of somebody who must see everything: only primaries answer."""

NOTHING: Final = "1"
"""The token of somebody who has seen nothing yet: any replica may answer, and the reader's own
token then says what it saw."""

_NUMBER: Final = r"(0|[1-9a-f][0-9a-f]{0,15})"
_MARK: Final = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:\.([0-9a-f_-]+))?")
_RANGE: Final = re.compile(r"(0|[1-9a-f][0-9a-f]{0,3})(?:-([1-9a-f][0-9a-f]{0,3}))?")


@dataclass(frozen=True, slots=True)
class Mark:
    """One log position that must have been seen.

    Attributes:
        system: system identifier of the server's cluster of databases; replicas share it.
        timeline: of the log; grows at each promotion, from 1.
        epoch: of the logical shards; the lowest of them when there are several.
        lsn: the log position, in bytes.
        shards: the logical shards it is about; None for every one that the server held.
    """

    system: int
    timeline: int
    epoch: int
    lsn: int
    shards: frozenset[int] | None = None

    @property
    def text(self) -> str:
        """The mark as it stands in a token."""
        numbers = f"{self.system:x}.{self.timeline:x}.{self.epoch:x}.{self.lsn:x}"
        return numbers if self.shards is None else f"{numbers}.{_ranges(self.shards)}"


@dataclass(frozen=True, slots=True)
class Need:
    """What a replica must have replayed before it may answer.

    Attributes:
        system: system identifier.
        timeline: of the log; 0 where no replica may answer.
        lsn: the log position, in bytes.
    """

    system: int
    timeline: int
    lsn: int


ONLY_PRIMARY: Final = Need(0, 0, 0)
"""Met by no replica, since timelines start at 1."""


@dataclass(frozen=True, slots=True)
class Token:
    """What a reader must have seen.

    Attributes:
        marks: positions, at most one for a logical shard.
        is_readable: False stands for everything: only primaries know it.
    """

    marks: tuple[Mark, ...] = ()
    is_readable: bool = True
    text: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        text = NOTHING if self.is_readable else ASK_PRIMARIES
        if self.marks:
            text = "~".join((NOTHING, *(mark.text for mark in self.marks)))
            text = f"{text}~{_check(text)}"
        object.__setattr__(self, "text", text)

    def need(
        self, system: int, shards: frozenset[int], *, epoch: int, systems: frozenset[int]
    ) -> Need | None:
        """Return what the replicas of one physical shard must have replayed, None for nothing.

        Args:
            system: system identifier of the physical shard.
            shards: the logical shards it holds.
            epoch: the highest of their epochs.
            systems: the system identifiers of all physical shards, as far as they are known.
        """
        if not self.is_readable:
            return ONLY_PRIMARY
        found: Need | None = None
        for mark in self.marks:
            if mark.system == system:
                if mark.shards is None or not mark.shards.isdisjoint(shards):
                    found = both(found, Need(system, mark.timeline, mark.lsn))
            elif mark.system not in systems:
                return ONLY_PRIMARY  # of another cluster, or of a server not met yet
            elif epoch > mark.epoch if mark.shards is None else not mark.shards.isdisjoint(shards):
                return ONLY_PRIMARY  # written elsewhere, and moved here since
        return found


def both(one: Need | None, other: Need | None) -> Need | None:
    """Return what meets two needs; two lineages are met by the primary only."""
    if one is None or other is None:
        return other if one is None else one
    if (one.system, one.timeline) != (other.system, other.timeline):
        return ONLY_PRIMARY
    return one if one.lsn >= other.lsn else other


def mint(system: int, timeline: int, lsn: int, epochs: Mapping[int, int]) -> Token:
    """Return the token of a commit.

    Args:
        system: system identifier of the server.
        timeline: of its log.
        lsn: a log position at or after the commit.
        epochs: epoch of each logical shard written to; not empty.
    """
    by_epoch: dict[int, set[int]] = {}
    for shard, epoch in epochs.items():
        by_epoch.setdefault(epoch, set()).add(shard)
    return _shortened(
        Mark(system, timeline, epoch, lsn, frozenset(shards))
        for epoch, shards in sorted(by_epoch.items())
    )


def merge(*tokens: str | None) -> str:
    """Return the token of somebody who must see all that any of these have seen.

    Args:
        *tokens: as `session.token` gives them; None and an empty text count for nothing.

    Returns:
        a token; `ASK_PRIMARIES` when one of them cannot be read.

    Example:
        >>> merge("1~a.1.1.10.3~9302b5af", "1~a.1.1.18.4~037571b4")
        '1~a.1.1.18.3-4~e2a38343'
        >>> merge(None, "broken")
        '0'
    """
    return joined(parse(token) for token in tokens if token).text


def covers(token: str, other: str) -> bool:
    """Tell whether a reader with one token sees all that another asks for."""
    found = parse(token)
    return bool(token) and (not found.is_readable or joined([found, parse(other)]) == found)


def joined(tokens: Iterable[Token]) -> Token:
    """Return the token that asks for all that these ask for.

    For each logical shard the higher epoch counts, then the higher timeline, then the later
    position. Where shards of one lineage are at different positions, all get the latest.
    """
    of_shards: dict[int, Mark] = {}
    of_servers: dict[int, Mark] = {}
    for token in tokens:
        if not token.is_readable:
            return Token(is_readable=False)
        for mark in token.marks:
            if mark.shards is None:
                held = of_servers.get(mark.system)
                of_servers[mark.system] = mark if held is None else _later(held, mark)
            else:
                for shard in mark.shards:
                    known = of_shards.get(shard)
                    if known is None or _rank(mark) > _rank(known):
                        of_shards[shard] = mark
    groups: dict[tuple[int, int, int], Mark] = {}
    for shard, mark in sorted(of_shards.items()):
        whole = of_servers.get(mark.system)
        if whole is not None and whole.timeline >= mark.timeline:
            of_servers[mark.system] = _later(whole, mark)
            continue
        lineage = (mark.system, mark.timeline, mark.epoch)
        group = groups.get(lineage)
        lsn, shards = (0, frozenset[int]()) if group is None else (group.lsn, group.shards or ())
        groups[lineage] = Mark(*lineage, max(lsn, mark.lsn), frozenset({*shards, shard}))
    return _shortened((*of_servers.values(), *groups.values()))


def parse(text: str) -> Token:
    """Return the token of a text; anything that is no token asks the primaries."""
    if len(text) > LONGEST:
        return Token(is_readable=False)
    if text == NOTHING:
        return Token()
    checked, _, check = text.rpartition("~")
    version, *marks = checked.split("~")
    try:
        if version != NOTHING or not marks or check != _check(checked):
            raise ValueError("of another version, or a part of a token")
        return Token(tuple(_mark(mark) for mark in marks))
    except ValueError:
        return Token(is_readable=False)


def _check(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _mark(text: str) -> Mark:
    found = _MARK.fullmatch(text)
    if found is None:
        raise ValueError("not a mark")
    system, timeline, epoch, lsn = (int(number, 16) for number in found.groups()[:4])
    if not (0 < timeline < 2**32 and 0 < epoch < 2**63):
        raise ValueError("out of range")
    shards = found.group(5)
    return Mark(system, timeline, epoch, lsn, None if shards is None else _shards(shards))


def _shards(text: str) -> frozenset[int]:
    shards: set[int] = set()
    for part in text.split("_"):
        found = _RANGE.fullmatch(part)
        if found is None:
            raise ValueError("not a range")
        first = int(found.group(1), 16)
        last = first if found.group(2) is None else int(found.group(2), 16)
        if not first <= last < MAX_LOGICAL_SHARDS:
            raise ValueError("no such logical shards")
        shards.update(range(first, last + 1))
    return frozenset(shards)


def _ranges(shards: frozenset[int]) -> str:
    runs: list[list[int]] = []
    for shard in sorted(shards):
        if runs and shard == runs[-1][1] + 1:
            runs[-1][1] = shard
        else:
            runs.append([shard, shard])
    return "_".join(f"{a:x}" if a == b else f"{a:x}-{b:x}" for a, b in runs)


def _rank(mark: Mark) -> tuple[int, int, int, int]:
    return (mark.epoch, mark.timeline, mark.lsn, mark.system)


def _later(one: Mark, other: Mark) -> Mark:
    """Return the mark of a whole server that stands for two of its marks."""
    timeline, lsn = max((one.timeline, one.lsn), (other.timeline, other.lsn))
    # The lowest epoch: a shard whose epoch is higher may have moved away since.
    return Mark(one.system, timeline, min(one.epoch, other.epoch), lsn)


def _shortened(marks: Iterable[Mark]) -> Token:
    """Return a token that is short enough, less exact where it has to be."""
    token = Token(tuple(sorted(marks, key=lambda mark: (mark.system, *_rank(mark)))))
    if len(token.text) <= LONGEST:
        return token
    servers: dict[int, Mark] = {}
    for mark in token.marks:
        servers[mark.system] = _later(servers.get(mark.system, mark), mark)
    token = Token(tuple(servers[system] for system in sorted(servers)))
    return token if len(token.text) <= LONGEST else Token(is_readable=False)
