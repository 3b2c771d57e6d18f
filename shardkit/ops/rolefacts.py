"""What a server says of roles and rights, as values: read by `shardkit.ops.rolesread`.

What is decided from them is `shardkit.ops.roles`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Login", "RoleFacts", "RoleState", "Thing"]


@dataclass(frozen=True, slots=True)
class RoleState:
    """A role as it is.

    Attributes:
        attributes: those of `shardkit.ops.roles` that it has.
        groups: what it is a member of; for each whether it inherits, and whether it may set it.
        settings: of the role in this database, as `name=value`.
    """

    attributes: frozenset[str]
    groups: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)
    settings: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Thing:
    """Something with an owner and rights, in one schema or alike in many.

    Attributes:
        kind: SCHEMA, TABLE, SEQUENCE, ROUTINE or TYPE.
        name: without its schema; empty for a schema itself.
        arguments: types of a routine's arguments, in brackets; else empty.
        owner: its role.
        rights: privileges by role, `PUBLIC` for everybody; those on columns as `SELECT (name)`.
        schemas: where it is so.
        is_linked: whether its owner follows that of a table, as of an identity column's sequence.
    """

    kind: str
    name: str
    arguments: str
    owner: str
    rights: Mapping[str, frozenset[str]]
    schemas: tuple[str, ...]
    is_linked: bool = False


@dataclass(frozen=True, slots=True)
class Login:
    """Who is to make the changes, and what it may do.

    Attributes:
        name: the role.
        is_superuser: whether it may do everything.
        attributes: those of `shardkit.ops.roles` that it has.
        administers: roles that it may give to others.
        uses: roles whose rights it has.
    """

    name: str
    is_superuser: bool = False
    attributes: frozenset[str] = frozenset()
    administers: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RoleFacts:
    """What one server says.

    Attributes:
        version: as `server_version_num`.
        database: its name.
        database_owner: its role.
        database_rights: privileges by role.
        public_creates: whether everybody may create in the schema `public`.
        roles: those that exist, of those that are asked about.
        things: everything in shardkit's schemas.
        defaults: what is granted on things to come, by schema (empty for every schema) and kind.
        stray_defaults: schemas in which roles that own nothing there give rights on what they
            make, by role, kind and who gets them.
        resting: logical shards that a move has claimed, or that are not active here: their rights
            are in its hands.
        login: who asks.
        unknown: roles that have a password in the configuration which the server refuses.
    """

    version: int
    database: str
    database_owner: str
    login: Login
    database_rights: Mapping[str, frozenset[str]] = field(default_factory=dict)
    public_creates: bool = False
    roles: Mapping[str, RoleState] = field(default_factory=dict)
    things: tuple[Thing, ...] = ()
    defaults: Mapping[tuple[str, str], Mapping[str, frozenset[str]]] = field(default_factory=dict)
    stray_defaults: Mapping[tuple[str, str, str], tuple[str, ...]] = field(default_factory=dict)
    resting: frozenset[int] = frozenset()
    unknown: frozenset[str] = frozenset()
