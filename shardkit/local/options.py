"""The shape of an embedded cluster, as values.

Made by the command line and by tests, kept in the state file between starts. Decides nothing
about processes or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from shardkit.config import format_ranges
from shardkit.errors import ConfigurationError
from shardkit.topology import MAX_LOGICAL_SHARDS

__all__ = ["PHYSICAL_NAMES", "LocalOptions"]

# fmt: off
PHYSICAL_NAMES = (
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta",
    "iota", "kappa", "lambda", "mu", "nu", "xi", "omicron", "pi",
)
# fmt: on
"""Names of physical shards, in the order they are given out."""

_FIXED = ("physical", "logical_shards")
_MAX_REPLICAS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalOptions:
    """What an embedded cluster consists of.

    Attributes:
        physical: number of physical shards, 1 to 16; fixed when the cluster is created.
        replicas: streaming replicas of each primary, 0 to 8; may grow later.
        logical_shards: fixed when the cluster is created; split evenly.
        redis: start a Redis, when one is found.
        memcached: start a Memcached, when one is found.
        pgbouncer: put one PgBouncer in front of each physical shard, when one is found.
        confirm: replicas that confirm each commit before it is acknowledged; 0 for none.
        fsync: False trades safety after a crash of the machine for speed; for tests.
        shared_buffers_mb: PostgreSQL's buffer cache per server, in MiB.
        settings: further PostgreSQL settings by name, for every server; they win.
        pgbouncer_settings: further PgBouncer settings by name; they win.

    *Invariant:* `physical` is at most `logical_shards`, so that every physical shard holds one.
    """

    physical: int = 2
    replicas: int = 2
    logical_shards: int = 64
    redis: bool = True
    memcached: bool = True
    pgbouncer: bool = True
    confirm: int = 0
    fsync: bool = True
    shared_buffers_mb: int = 64
    settings: Mapping[str, str] = field(default_factory=dict)
    pgbouncer_settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("physical", self.physical, 1, len(PHYSICAL_NAMES))
        _check("replicas", self.replicas, 0, _MAX_REPLICAS)
        _check("logical_shards", self.logical_shards, self.physical, MAX_LOGICAL_SHARDS)
        _check("confirm", self.confirm, 0, self.replicas)
        _check("shared_buffers_mb", self.shared_buffers_mb, 1, 16384)

    @property
    def physical_names(self) -> tuple[str, ...]:
        """Names of the physical shards: alpha, beta, gamma and so on."""
        return PHYSICAL_NAMES[: self.physical]

    def placement(self) -> dict[str, str]:
        """Return the logical shards of each physical shard as ranges: `{"alpha": "0-31", …}`."""
        edges = [self.logical_shards * n // self.physical for n in range(self.physical + 1)]
        return {
            name: format_ranges(range(edges[n], edges[n + 1]))
            for n, name in enumerate(self.physical_names)
        }

    def changes_refused(self, new: Self) -> list[str]:
        """Return why data made with these options cannot be used with others; possibly empty."""
        reasons = [
            f"{name} was fixed at {getattr(self, name)} when the cluster was created, "
            f"{getattr(new, name)} is asked for"
            for name in _FIXED
            if getattr(self, name) != getattr(new, name)
        ]
        if new.replicas < self.replicas:
            reasons.append(f"replicas can grow but not shrink from {self.replicas}")
        return reasons

    def as_json(self) -> dict[str, Any]:
        """Return the options as plain values, for the state file."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the options of a state file; unknown names are ignored."""
        known = cls.__dataclass_fields__
        return cls(**{name: value for name, value in values.items() if name in known})


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigurationError(f"{name}: {value} is outside {low} to {high}")
