"""What `shardkit roles` has to change on a server, decided from what it is asked for: pure.

`RoleFacts` says what is there, `shardkit.ops.rights` and the names of `[roles]` what should be;
`decide` returns the changes in the order in which they can be made, each with its SQL and a line
for people. What is the same in many logical shards is one change. It is read by
`shardkit.ops.rolesread` and applied by `shardkit.ops.rolesrun`; the doctor uses `decide`, too.
Source: docs/roles.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from psycopg import sql

from shardkit.ops import rights
from shardkit.ops.rights import PUBLIC, Rights
from shardkit.ops.rolefacts import RoleFacts, Thing
from shardkit.topology import RoleNames, schema_name

__all__ = ["DEFAULT_OBJECTS", "Change", "decide", "managed"]

_WITH_OPTIONS: Final = 160000
"""First version whose memberships say whether rights are inherited and roles may be set, and
whose CREATEROLE reaches only roles that were made by it. Source: release notes of PostgreSQL 16."""

_ATTRIBUTES: Final = ("login", "superuser", "createdb", "createrole", "replication", "bypassrls")

DEFAULT_OBJECTS: Final = {"r": "TABLES", "S": "SEQUENCES", "f": "FUNCTIONS"}
"""Objects of default privileges, by `defaclobjtype`."""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is not as it should be, and how it becomes so.

    Attributes:
        what: in one line, without schemas.
        statements: one for each schema, or one.
        schemas: where; empty for the server.
        password_of: role whose password is set; its statement has the verifier, made later.
        needs: why the login at hand cannot do it; empty when it can.
    """

    what: str
    statements: tuple[sql.Composed, ...] = ()
    schemas: tuple[str, ...] = ()
    password_of: str = ""
    needs: str = ""


def managed(roles: RoleNames) -> list[str]:
    """Return the roles that are made and kept here: all but the admin's."""
    names = dict.fromkeys(
        (roles.owner, roles.app, roles.migrator, roles.mover, roles.relay, roles.monitor)
    )
    return [name for name in names if name and name != roles.admin]


def decide(facts: RoleFacts, roles: RoleNames) -> list[Change]:
    """Return what has to be changed on a server, in order; possibly nothing."""
    return [
        *_roles(facts, roles),
        *_database(facts, roles),
        *_owners(facts, roles),
        *_rights(facts, roles),
        *_defaults(facts, roles),
    ]


# -- roles


def _roles(facts: RoleFacts, roles: RoleNames) -> Iterator[Change]:
    names = managed(roles)
    for name in names:
        yield from _role(facts, roles, name)
    wanted = _groups(facts, roles)
    for name in (*names, roles.admin):
        has = facts.roles[name].groups if name in facts.roles else {}
        for group in wanted.get(name, ()):
            if has.get(group) != (True, True):
                yield _granted(facts, group, name)
        if name != roles.admin:
            for group in sorted(has.keys() - wanted.get(name, frozenset())):
                text = sql.SQL("REVOKE {} FROM {}").format(*_names(group, name))
                needs = _needs(facts, group)
                yield Change(f"take role {group} from {name}", (text,), needs=needs)
    if roles.migrator not in {roles.admin, roles.owner}:
        state = facts.roles.get(roles.migrator)
        setting = f"role={quoted(roles.owner)}"
        if state is None or not {setting, f"role={roles.owner}"} & state.settings:
            text = sql.SQL("ALTER ROLE {} IN DATABASE {} SET role = {}").format(
                *_names(roles.migrator, facts.database), sql.Literal(roles.owner)
            )
            yield Change(
                f"have what {roles.migrator} makes belong to {roles.owner}",
                (text,),
                needs=_needs(facts, roles.migrator),
            )
    for name in names:
        if name in facts.unknown:
            yield Change(f"set the password of {name}", password_of=name, needs=_needs(facts, name))


def _role(facts: RoleFacts, roles: RoleNames, name: str) -> Iterator[Change]:
    wanted = set() if name == roles.owner else {"login"}
    if name == roles.mover and name not in {roles.migrator, roles.owner}:
        wanted.add("replication")
    state = facts.roles.get(name)
    if state is None:
        words = [each.upper() for each in _ATTRIBUTES if each in wanted] or ["NOLOGIN"]
        text = sql.SQL("CREATE ROLE {} {}").format(sql.Identifier(name), sql.SQL(" ".join(words)))
        needs = "" if _may(facts, *wanted - {"login"}) else "a superuser"
        needs = needs if _may(facts) else "CREATEROLE"
        what = " ".join(["create role", name, *(["which replicates"] * ("replication" in wanted))])
        yield Change(what, (text,), needs=needs)
        return
    if wrong := state.attributes ^ wanted:
        words = [("" if each in wanted else "NO") + each.upper() for each in _ATTRIBUTES
                 if each in wrong]  # fmt: skip
        text = sql.SQL("ALTER ROLE {} {}").format(sql.Identifier(name), sql.SQL(" ".join(words)))
        needs = _needs(facts, name) or ("" if _may(facts, *wrong - {"login"}) else "a superuser")
        yield Change(f"role {name}: {' '.join(words)}", (text,), needs=needs)


def _groups(facts: RoleFacts, roles: RoleNames) -> dict[str, frozenset[str]]:
    """Return of which groups each role has to be a member."""
    found: dict[str, set[str]] = {}

    def add(name: str, group: str) -> None:
        if name != group:
            found.setdefault(name, set()).add(group)

    add(roles.admin, roles.owner)
    add(roles.migrator, roles.owner)
    add(roles.mover, roles.owner)
    add(roles.relay, roles.app)
    if roles.owner != roles.admin:
        # For the timeline of `shardkit.replayed`, and how far replicas are during a migration.
        add(roles.owner, "pg_read_all_stats")
    if roles.has_monitor:
        add(roles.monitor, "pg_monitor")
    if roles.mover not in {roles.admin, roles.migrator} and facts.version >= _WITH_OPTIONS:
        add(roles.mover, "pg_create_subscription")
    return {name: frozenset(groups) for name, groups in found.items()}


def _granted(facts: RoleFacts, group: str, name: str) -> Change:
    options = " WITH INHERIT TRUE, SET TRUE" if facts.version >= _WITH_OPTIONS else ""
    text = sql.SQL("GRANT {} TO {}" + options).format(*_names(group, name))
    return Change(f"give role {group} to {name}", (text,), needs=_needs(facts, group))


def _may(facts: RoleFacts, *attributes: str) -> bool:
    """Return whether the login may make roles with these attributes."""
    login = facts.login
    if login.is_superuser:
        return True
    if "superuser" in attributes or "createrole" not in login.attributes:
        return False
    if facts.version < _WITH_OPTIONS:
        return not set(attributes) - {"createdb", "createrole"}
    return set(attributes) <= login.attributes


def _needs(facts: RoleFacts, name: str) -> str:
    """Return what the login lacks to change a role or to give it away; empty for nothing."""
    login = facts.login
    is_new = name not in facts.roles and not name.startswith("pg_")
    if login.is_superuser or (_may(facts) and is_new):
        return ""
    if name in login.administers or (_may(facts) and facts.version < _WITH_OPTIONS):
        return ""
    return f"ADMIN OPTION on {name}"


# -- the database


def _database(facts: RoleFacts, roles: RoleNames) -> Iterator[Change]:
    needs = "" if _is_of(facts, facts.database_owner) else f"the owner, {facts.database_owner}"
    name = sql.Identifier(facts.database)
    if facts.database_owner in {*managed(roles)} - {roles.owner}:
        text = sql.SQL("ALTER DATABASE {} OWNER TO {}").format(name, sql.Identifier(roles.admin))
        yield Change(
            f"database: owned by {facts.database_owner}, to be {roles.admin}'s",
            (text,),
            needs="" if facts.login.is_superuser else "a superuser",
        )
    wanted: dict[str, frozenset[str]] = {PUBLIC: frozenset()}
    for role in managed(roles):
        wanted[role] = frozenset({"CONNECT"})
    if roles.mover in wanted:
        wanted[roles.mover] = frozenset({"CONNECT", "CREATE"})
    if roles.owner in wanted:
        wanted[roles.owner] = frozenset({"CONNECT", "CREATE", "TEMPORARY"})
    wanted.pop(facts.database_owner, None)
    for what, verb, role_ in _differences("DATABASE", wanted, facts.database_rights):
        yield Change(f"database: {what}", (verb.format(thing=name, role=role_),), needs=needs)
    if facts.public_creates:
        revoke = sql.SQL("REVOKE CREATE ON SCHEMA public FROM PUBLIC").format()
        yield Change("schema public: take CREATE from everybody", (revoke,), needs=needs)


# -- schemas and what is in them


def _owners(facts: RoleFacts, roles: RoleNames) -> Iterator[Change]:
    for thing in facts.things:
        if thing.owner == roles.owner or thing.is_linked:
            continue
        text = "ALTER {kind} {name} OWNER TO {owner}"
        if not _is_of(facts, thing.owner):
            # Who may give a role away may be it for a moment.
            text = f"GRANT {{former}} TO {{login}}; {text}; REVOKE {{former}} FROM {{login}}"
        texts = tuple(
            sql.SQL(text).format(
                kind=sql.SQL(thing.kind),
                name=_name(thing, at),
                owner=sql.Identifier(roles.owner),
                former=sql.Identifier(thing.owner),
                login=sql.Identifier(facts.login.name),
            )
            for at in thing.schemas
        )
        what = f"{_called(thing)}: owned by {thing.owner}, to be {roles.owner}'s"
        yield Change(what, texts, thing.schemas, needs=_needs_owner(facts, thing.owner))


def _rights(facts: RoleFacts, roles: RoleNames) -> Iterator[Change]:
    resting = {schema_name(number) for number in facts.resting}
    for thing in facts.things:
        for schemas, should in _wanted(thing, resting):
            wanted = {PUBLIC: frozenset[str](), **should.by_role(roles)}
            # After a change of owner, the former one's rights are the new one's.
            has = {role: found for role, found in thing.rights.items() if role != thing.owner}
            for what, verb, role in _differences(thing.kind, wanted, has):
                texts = tuple(verb.format(thing=_name(thing, at), role=role) for at in schemas)
                needs = _needs_owner(facts, thing.owner)
                yield Change(f"{_called(thing)}: {what}", texts, schemas, needs=needs)


def _wanted(thing: Thing, resting: set[str]) -> Iterator[tuple[tuple[str, ...], Rights]]:
    """Yield the schemas in which one thing is to have the same rights."""
    if thing.kind == "TYPE" or (thing.kind == "ROUTINE" and thing.name.startswith("shardkit_")):
        return  # functions of triggers, which nobody can call
    grouped: dict[Rights, list[str]] = {}
    for schema in thing.schemas:
        if schema in resting:
            continue
        if thing.kind == "SCHEMA":
            should = rights.of_schema(schema)
        elif thing.kind == "TABLE":
            should = rights.of_table(schema, thing.name)
        elif thing.kind == "SEQUENCE":
            should = rights.of_sequence(schema, thing.name)
        else:
            should = rights.of_function(schema, f"{thing.name}{thing.arguments}")
        grouped.setdefault(should, []).append(schema)
    for should, schemas in grouped.items():
        yield tuple(schemas), should


def _defaults(facts: RoleFacts, roles: RoleNames) -> Iterator[Change]:
    schemas = [at for thing in facts.things if thing.kind == "SCHEMA" for at in thing.schemas]
    if not schemas:
        return  # `migrate apply` does it when it begins
    needs = "" if _is_of(facts, roles.owner) else f"the owner, {roles.owner}"
    owner = sql.Identifier(roles.owner)
    functions = facts.defaults.get(("", "FUNCTIONS"))
    if functions is None or "EXECUTE" in functions.get(PUBLIC, ()):
        text = sql.SQL(
            "ALTER DEFAULT PRIVILEGES FOR ROLE {} REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC"
        ).format(owner)
        yield Change("functions to come: take EXECUTE from everybody", (text,), needs=needs)
    grouped: dict[tuple[str, str, frozenset[str], bool], list[str]] = {}
    for schema in schemas:
        number = rights.shard_numbered(schema)
        if number in facts.resting:
            continue
        kinds = rights.DEFAULTS.get(schema if number is None else "shard", {})
        for objects in DEFAULT_OBJECTS.values():
            should = kinds.get(objects, rights.NOTHING).by_role(roles)
            has = facts.defaults.get((schema, objects), {})
            for role, wanted in {PUBLIC: frozenset[str](), **should}.items():
                found = has.get(role, frozenset())
                for is_given, differing in ((True, wanted - found), (False, found - wanted)):
                    if differing:
                        key = (objects, role, differing, is_given)
                        grouped.setdefault(key, []).append(schema)
    for (objects, role, differing, is_given), where in grouped.items():
        verb = "give" if is_given else "take"
        told = f"{', '.join(sorted(differing))} {'to' if is_given else 'from'} {_told(role)}"
        texts = tuple(
            _default(owner, schema, sorted(differing), objects, role, is_given=is_given)
            for schema in where
        )
        yield Change(f"{objects.lower()} to come: {verb} {told}", texts, tuple(where), needs=needs)
    for (maker, objects, role), places in facts.stray_defaults.items():
        if maker in {roles.admin, *managed(roles)} - {roles.owner}:
            texts = tuple(
                _default(sql.Identifier(maker), schema, ["ALL"], objects, role, is_given=False)
                for schema in places
            )
            yield Change(
                f"{objects.lower()} to come of {maker}, who owns nothing: take all "
                f"from {_told(role)}",
                texts,
                places,
                needs="" if _is_of(facts, maker) else f"the role {maker}",
            )


def _default(
    maker: sql.Identifier,
    schema: str,
    privileges: Iterable[str],
    objects: str,
    role: str,
    *,
    is_given: bool,
) -> sql.Composed:
    verb, to = ("GRANT", "TO") if is_given else ("REVOKE", "FROM")
    return sql.SQL(
        f"ALTER DEFAULT PRIVILEGES FOR ROLE {{}} IN SCHEMA {{}} {verb} {', '.join(privileges)} "
        f"ON {objects} {to} {{}}"
    ).format(maker, sql.Identifier(schema), _role_named(role))


class _Verb:
    """GRANT or REVOKE of some privileges, for any thing and role."""

    def __init__(self, kind: str, privileges: Iterable[str], *, is_given: bool) -> None:
        verb, to = ("GRANT", "TO") if is_given else ("REVOKE", "FROM")
        self._text = f"{verb} {', '.join(privileges)} ON {kind} {{thing}} {to} {{role}}"

    def format(self, *, thing: sql.Composable, role: sql.Composable) -> sql.Composed:
        return sql.SQL(self._text).format(thing=thing, role=role)


def _differences(
    kind: str, wanted: Mapping[str, frozenset[str]], has: Mapping[str, frozenset[str]]
) -> Iterator[tuple[str, _Verb, sql.Composable]]:
    """Yield what has to be given and taken, for roles that are asked about."""
    for role, should in wanted.items():
        found = has.get(role, frozenset())
        if missing := sorted(should - found):
            what = f"give {', '.join(missing)} to {_told(role)}"
            yield what, _Verb(kind, missing, is_given=True), _role_named(role)
        if extra := sorted(found - should):
            what = f"take {', '.join(extra)} from {_told(role)}"
            yield what, _Verb(kind, extra, is_given=False), _role_named(role)


def _is_of(facts: RoleFacts, owner: str) -> bool:
    """Return whether the login may act as an owner, once it has been made a member."""
    return facts.login.is_superuser or owner in facts.login.uses or owner not in facts.roles


def _needs_owner(facts: RoleFacts, owner: str) -> str:
    """Return what the login lacks to change what somebody owns; empty for nothing."""
    if _is_of(facts, owner) or not _needs(facts, owner):
        return ""
    return f"the owner, {owner}"


def _called(thing: Thing) -> str:
    return f"{thing.kind.lower()} {thing.name}{thing.arguments}".strip()


def _name(thing: Thing, schema: str) -> sql.Composable:
    if thing.kind == "SCHEMA":
        return sql.Identifier(schema)
    # The arguments are types as PostgreSQL writes them, quoted where they have to be.
    return sql.Identifier(schema, thing.name) + sql.SQL(thing.arguments)


def _names(*names: str) -> Sequence[sql.Identifier]:
    return [sql.Identifier(name) for name in names]


def _role_named(role: str) -> sql.Composable:
    return sql.SQL("PUBLIC") if role == PUBLIC else sql.Identifier(role)


def _told(role: str) -> str:
    return "everybody" if role == PUBLIC else role


def quoted(name: str) -> str:
    """Return a name as PostgreSQL quotes it in a setting."""
    return '"' + name.replace('"', '""') + '"'
