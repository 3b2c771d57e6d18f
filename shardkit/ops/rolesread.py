"""Asks a primary who may do what: roles, owners, rights, and rights to come.

Called by `shardkit.ops.rolesrun` and the doctor; changes nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import psycopg

from shardkit.ops.rolefacts import Login, RoleFacts, RoleState, Thing
from shardkit.ops.roles import DEFAULT_OBJECTS, managed
from shardkit.topology import PhysicalShard

__all__ = ["read"]

# All of these read catalogues, with AccessShareLock.
_SERVER: Final = """
SELECT current_setting('server_version_num')::int, d.datname::text,
    pg_get_userbyid(d.datdba)::text, current_user::text,
    (SELECT jsonb_object_agg(who, what) FROM (
        SELECT coalesce(r.rolname::text, '') AS who, jsonb_agg(x.privilege_type) AS what
        FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) AS x
        LEFT JOIN pg_roles AS r ON r.oid = x.grantee GROUP BY 1) AS e),
    EXISTS (SELECT FROM pg_namespace AS n,
        aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) AS x
        WHERE n.nspname = 'public' AND x.grantee = 0 AND x.privilege_type = 'CREATE'),
    to_regclass('shardkit.ownership') IS NOT NULL
FROM pg_database AS d WHERE d.datname = current_database()
"""
_LOGIN: Final = """
SELECT r.rolsuper, array_remove(ARRAY[
        CASE WHEN rolcreatedb THEN 'createdb' END, CASE WHEN rolcreaterole THEN 'createrole' END,
        CASE WHEN rolreplication THEN 'replication' END,
        CASE WHEN rolbypassrls THEN 'bypassrls' END], NULL),
    ARRAY(SELECT g.rolname::text FROM pg_roles AS g
        WHERE pg_has_role(r.oid, g.oid, 'MEMBER WITH ADMIN OPTION')),
    ARRAY(SELECT g.rolname::text FROM pg_roles AS g WHERE pg_has_role(r.oid, g.oid, 'USAGE'))
FROM pg_roles AS r WHERE r.rolname = current_user
"""
_ROLES: Final = """
SELECT r.rolname::text, array_remove(ARRAY[
        CASE WHEN rolcanlogin THEN 'login' END, CASE WHEN rolsuper THEN 'superuser' END,
        CASE WHEN rolcreatedb THEN 'createdb' END, CASE WHEN rolcreaterole THEN 'createrole' END,
        CASE WHEN rolreplication THEN 'replication' END,
        CASE WHEN rolbypassrls THEN 'bypassrls' END], NULL),
    coalesce((SELECT jsonb_object_agg(name, options) FROM (
        SELECT g.rolname::text AS name, jsonb_build_array(
            bool_or(coalesce((to_jsonb(m) ->> 'inherit_option')::boolean, r.rolinherit)),
            bool_or(coalesce((to_jsonb(m) ->> 'set_option')::boolean, true))) AS options
        FROM pg_auth_members AS m JOIN pg_roles AS g ON g.oid = m.roleid
        WHERE m.member = r.oid GROUP BY g.rolname) AS e), '{}'),
    coalesce((SELECT s.setconfig FROM pg_db_role_setting AS s JOIN pg_database AS d
        ON d.oid = s.setdatabase AND d.datname = current_database()
        WHERE s.setrole = r.oid), '{}')
FROM pg_roles AS r WHERE r.rolname = ANY (%s)
"""
# Grouped before rights are taken apart: what thousands of schemas have alike is one row.
_THINGS: Final = """
WITH s AS (
    SELECT oid, nspname, nspowner, nspacl FROM pg_namespace
    WHERE nspname IN ('shardkit', 'reference') OR nspname ~ '^shard_[0-9]{4}$'
), found AS (
    SELECT 'SCHEMA' AS kind, 'n'::"char" AS type, '' AS name, '' AS arguments,
        nspowner AS owner, nspacl AS acl, NULL::jsonb AS columns, false AS linked, nspname FROM s
    UNION ALL
    SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END,
        CASE c.relkind WHEN 'S' THEN 's'::"char" ELSE 'r'::"char" END, c.relname::text, '',
        c.relowner, c.relacl,
        (SELECT jsonb_agg(jsonb_build_array(coalesce(r.rolname::text, ''),
            x.privilege_type || ' (' || quote_ident(a.attname) || ')'))
            FROM pg_attribute AS a, aclexplode(a.attacl) AS x
            LEFT JOIN pg_roles AS r ON r.oid = x.grantee
            WHERE a.attrelid = c.oid AND a.attnum > 0 AND a.attacl IS NOT NULL),
        EXISTS (SELECT FROM pg_depend AS d WHERE d.classid = 'pg_class'::regclass
            AND d.objid = c.oid AND d.refclassid = 'pg_class'::regclass
            AND d.deptype IN ('a', 'i') AND c.relkind = 'S'), s.nspname
    FROM s JOIN pg_class AS c ON c.relnamespace = s.oid
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
    UNION ALL
    SELECT 'ROUTINE', 'f'::"char", p.proname::text, '(' || oidvectortypes(p.proargtypes) || ')',
        p.proowner, p.proacl, NULL, false, s.nspname
    FROM s JOIN pg_proc AS p ON p.pronamespace = s.oid
    UNION ALL
    SELECT 'TYPE', 'T'::"char", t.typname::text, '', t.typowner, t.typacl, NULL, false, s.nspname
    FROM s JOIN pg_type AS t ON t.typnamespace = s.oid
    WHERE t.typtype IN ('e', 'd', 'r') OR (t.typtype = 'c'
        AND EXISTS (SELECT FROM pg_class AS c WHERE c.oid = t.typrelid AND c.relkind = 'c'))
), alike AS (
    SELECT kind, type, name, arguments, owner, acl::text AS acl, columns, linked,
        array_agg(nspname::text ORDER BY nspname) AS schemas
    FROM found GROUP BY 1, 2, 3, 4, 5, 6, 7, 8
)
SELECT kind, name, arguments, pg_get_userbyid(owner)::text,
    coalesce((SELECT jsonb_object_agg(who, what) FROM (
        SELECT coalesce(r.rolname::text, '') AS who, jsonb_agg(x.privilege_type) AS what
        FROM aclexplode(coalesce(acl::aclitem[], acldefault(type, owner))) AS x
        LEFT JOIN pg_roles AS r ON r.oid = x.grantee GROUP BY 1) AS e), '{}'),
    columns, schemas, linked
FROM alike ORDER BY array_position(ARRAY['SCHEMA', 'TABLE', 'SEQUENCE', 'ROUTINE'], kind), 2, 3
"""
_DEFAULTS: Final = """
SELECT o.rolname::text, coalesce(n.nspname::text, ''), d.defaclobjtype::text,
    coalesce((SELECT jsonb_object_agg(who, what) FROM (
        SELECT coalesce(r.rolname::text, '') AS who, jsonb_agg(x.privilege_type) AS what
        FROM aclexplode(d.defaclacl) AS x
        LEFT JOIN pg_roles AS r ON r.oid = x.grantee GROUP BY 1) AS e), '{}')
FROM pg_default_acl AS d JOIN pg_roles AS o ON o.oid = d.defaclrole
LEFT JOIN pg_namespace AS n ON n.oid = d.defaclnamespace
WHERE n.oid IS NULL OR n.nspname IN ('shardkit', 'reference') OR n.nspname ~ '^shard_[0-9]{4}$'
ORDER BY 1, 2, 3
"""
# As JSON, since an older version has no such column.
_RESTING: Final = """
SELECT logical_shard FROM shardkit.ownership AS o
WHERE state <> 'active' OR to_jsonb(o) ->> 'move_id' IS NOT NULL
"""


def read(connection: psycopg.Connection[Any], shard: PhysicalShard) -> RoleFacts:
    """Return what a primary says of roles and rights.

    Args:
        connection: to it, in autocommit mode; its search path is put back.
        shard: whose roles are asked about.
    """
    names = [*managed(shard.roles), shard.roles.admin]
    with connection.transaction():
        connection.execute("SET LOCAL search_path = pg_catalog")
        row = connection.execute(_SERVER).fetchone()
        assert row is not None, "a connection has a database"
        version, database, owner, name, on_database, public_creates, is_used = row
        who = connection.execute(_LOGIN).fetchone()
        assert who is not None, "the current user is a role"
        is_superuser, attributes, administers, uses = who
        roles = {
            role: RoleState(
                frozenset(has), {g: (o[0], o[1]) for g, o in groups.items()}, frozenset(settings)
            )
            for role, has, groups, settings in connection.execute(_ROLES, [names])
        }
        things = tuple(map(_thing, connection.execute(_THINGS)))
        defaults: dict[tuple[str, str], dict[str, frozenset[str]]] = {}
        strays: dict[tuple[str, str, str], list[str]] = {}
        for maker, schema, letter, rights in connection.execute(_DEFAULTS):
            objects = DEFAULT_OBJECTS.get(letter, "")
            if maker == shard.roles.owner:
                defaults[schema, objects] = _sets(rights)
            elif schema and objects:
                for role in rights:
                    strays.setdefault((maker, objects, role), []).append(schema)
        resting = connection.execute(_RESTING).fetchall() if is_used else []
    return RoleFacts(
        version=version,
        database=database,
        database_owner=owner,
        login=Login(
            name, is_superuser, frozenset(attributes), frozenset(administers), frozenset(uses)
        ),
        database_rights=_sets(on_database or {}),
        public_creates=public_creates,
        roles=roles,
        things=things,
        defaults=defaults,
        stray_defaults={key: tuple(schemas) for key, schemas in strays.items()},
        resting=frozenset(number for (number,) in resting),
    )


def _thing(row: Sequence[Any]) -> Thing:
    kind, name, arguments, owner, rights, columns, schemas, is_linked = row
    found = _sets(rights)
    for role, right in columns or ():
        found[role] = found.get(role, frozenset()) | {right}
    return Thing(kind, name, arguments, owner, found, tuple(schemas), is_linked)


def _sets(rights: Mapping[str, Iterable[str]]) -> dict[str, frozenset[str]]:
    return {role: frozenset(found) for role, found in rights.items()}
