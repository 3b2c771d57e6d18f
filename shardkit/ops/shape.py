"""What the catalogue says a schema is: every object as a line of text, and a digest of all.

Two schemas with the same digest have the same tables, columns, types, defaults, indexes,
constraints, triggers, rights, policies, sequences, views and functions, whatever the schemas are
called. The order of columns is left out: it differs where a column was added again, and no
statement that names its columns notices. Called by `shardkit.ops.drift`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import psycopg

__all__ = ["SCHEMAS_PER_QUERY", "Objects", "details", "digests"]

Objects = Mapping[tuple[str, str], str]
"""Definition by kind and name."""

SCHEMAS_PER_QUERY = 128

# AccessShareLock on catalogues; the functions that write definitions out lock nothing. Names are
# qualified by the empty search path, and the schema's own is cut out, so that schemas compare.
_OBJECTS = """
WITH s AS (
    SELECT oid, nspname, quote_ident(nspname) || '.' AS own, nspacl, nspowner
    FROM pg_namespace WHERE nspname = ANY (%(schemas)s)
), r AS (
    SELECT c.*, s.nspname, s.own FROM pg_class AS c JOIN s ON s.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
), found (nspname, own, kind, name, text) AS (
    SELECT nspname, own, 'table', relname, concat_ws(' ', relkind, relpersistence,
        array_to_string(reloptions, ' '), CASE WHEN relrowsecurity THEN 'row security' END,
        CASE WHEN relforcerowsecurity THEN 'forced' END, 'identity ' || relreplident::text,
        'of ' || pg_get_userbyid(relowner),
        CASE WHEN relkind IN ('v', 'm') THEN pg_get_viewdef(oid) END)
    FROM r
    UNION ALL
    SELECT nspname, own, 'column', relname || '.' || attname, concat_ws(' ',
        format_type(atttypid, atttypmod), CASE WHEN attnotnull THEN 'NOT NULL' END,
        CASE WHEN attgenerated <> '' THEN 'GENERATED' || attgenerated::text ELSE
            CASE WHEN d.oid IS NOT NULL THEN 'DEFAULT' END END,
        pg_get_expr(d.adbin, d.adrelid), nullif('IDENTITY' || attidentity::text, 'IDENTITY'),
        (SELECT 'COLLATE ' || collname FROM pg_collation AS l JOIN pg_type AS t ON t.oid = atttypid
            WHERE l.oid = attcollation AND attcollation <> t.typcollation))
    FROM r JOIN pg_attribute AS a ON a.attrelid = r.oid AND attnum > 0 AND NOT attisdropped
        LEFT JOIN pg_attrdef AS d ON d.adrelid = r.oid AND d.adnum = attnum
    WHERE relkind <> 'S'
    UNION ALL
    SELECT nspname, own, 'index', i.relname, pg_get_indexdef(i.oid)
        || CASE WHEN x.indisvalid AND x.indisready THEN '' ELSE ' INVALID' END
        || coalesce(' ' || array_to_string(i.reloptions, ' '), '')
    FROM r JOIN pg_index AS x ON x.indrelid = r.oid JOIN pg_class AS i ON i.oid = x.indexrelid
    UNION ALL
    SELECT nspname, own, 'constraint', relname || '.' || conname, pg_get_constraintdef(k.oid)
    FROM r JOIN pg_constraint AS k ON k.conrelid = r.oid
    WHERE k.contype <> 'n' OR NOT k.convalidated
    UNION ALL
    SELECT nspname, own, 'trigger', relname || '.' || tgname,
        pg_get_triggerdef(t.oid)
            || CASE WHEN tgenabled = 'O' THEN '' ELSE ' mode ' || tgenabled::text END
    FROM r JOIN pg_trigger AS t ON t.tgrelid = r.oid WHERE NOT tgisinternal
    UNION ALL
    SELECT nspname, own, 'policy', relname || '.' || polname, concat_ws(' ', polcmd,
        polpermissive::text, (SELECT string_agg(coalesce(nullif(m, 0)::regrole::text, 'public'), ','
            ORDER BY m) FROM unnest(polroles) AS m),
        'USING ' || pg_get_expr(polqual, polrelid), 'CHECK ' || pg_get_expr(polwithcheck, polrelid))
    FROM r JOIN pg_policy AS p ON p.polrelid = r.oid
    UNION ALL
    SELECT nspname, own, 'grant', relname || ' to ' || grantee, rights FROM r, LATERAL (
        SELECT CASE WHEN g.grantee = 0 THEN 'public' ELSE pg_get_userbyid(g.grantee) END AS grantee,
            string_agg(privilege_type || CASE WHEN is_grantable THEN '*' ELSE '' END, ' '
                ORDER BY privilege_type) AS rights
        FROM aclexplode(coalesce(relacl,
            acldefault(CASE WHEN relkind = 'S' THEN 's' ELSE 'r' END::"char", relowner))) AS g
        GROUP BY 1) AS g
    UNION ALL
    SELECT nspname, own, 'grant', relname || '.' || attname, attacl::text
    FROM r JOIN pg_attribute AS a ON a.attrelid = r.oid AND attacl IS NOT NULL
    UNION ALL
    SELECT nspname, own, 'grant', 'schema', coalesce(nspacl, acldefault('n', nspowner))::text FROM s
    UNION ALL
    SELECT nspname, own, 'default rights',
        pg_get_userbyid(defaclrole) || ' ' || defaclobjtype::text, defaclacl::text
    FROM s JOIN pg_default_acl ON defaclnamespace = s.oid
    UNION ALL
    SELECT nspname, own, 'sequence', relname, concat_ws(' ', format_type(seqtypid, NULL), seqstart,
        seqincrement, seqmin, seqmax, seqcache, seqcycle)
    FROM r JOIN pg_sequence AS q ON q.seqrelid = r.oid
    UNION ALL
    SELECT nspname, own, 'type', typname, CASE typtype
        WHEN 'e' THEN (SELECT string_agg(quote_literal(enumlabel), ', ' ORDER BY enumsortorder)
            FROM pg_enum WHERE enumtypid = t.oid)
        ELSE concat_ws(' ', typtype, format_type(typbasetype, typtypmod), typnotnull::text,
            typdefault, (SELECT string_agg(pg_get_constraintdef(k.oid), ' ' ORDER BY conname)
                FROM pg_constraint AS k WHERE contypid = t.oid)) END
    FROM s JOIN pg_type AS t ON t.typnamespace = s.oid
    WHERE typtype IN ('e', 'd', 'r') OR (typtype = 'c'
        AND EXISTS (SELECT FROM pg_class WHERE oid = typrelid AND relkind = 'c'))
    UNION ALL
    SELECT nspname, own, 'function', proname || '(' || pg_get_function_identity_arguments(p.oid)
        || ')', CASE WHEN prokind IN ('f', 'p') THEN pg_get_functiondef(p.oid)
            ELSE prokind::text END || coalesce(proacl::text, '')
    FROM s JOIN pg_proc AS p ON p.pronamespace = s.oid
), plain AS (
    SELECT nspname, kind, name::text AS name,
        replace(replace(text, own, ''), 'SCHEMA ' || nspname, 'SCHEMA') AS text
    FROM found
)
"""

_DIGESTS = """
SELECT nspname, encode(sha256(convert_to(string_agg(
    concat_ws(E'\\x01', kind, name, text), E'\\x02' ORDER BY kind, name, text), 'UTF8')), 'hex')
FROM plain GROUP BY nspname
"""

_DETAILS = "SELECT nspname, kind, name, text FROM plain"


def digests(connection: psycopg.Connection[Any], schemas: Sequence[str]) -> dict[str, str]:
    """Return the digest of each schema that exists."""
    found: dict[str, str] = {}
    for rows in _ask(connection, _OBJECTS + _DIGESTS, schemas):
        found.update(rows)
    return found


def details(connection: psycopg.Connection[Any], schemas: Sequence[str]) -> dict[str, Objects]:
    """Return every object of each schema."""
    found: dict[str, dict[tuple[str, str], str]] = {schema: {} for schema in schemas}
    for rows in _ask(connection, _OBJECTS + _DETAILS, schemas):
        for schema, kind, name, text in rows:
            found[schema][kind, name] = text
    return dict(found)


def _ask(
    connection: psycopg.Connection[Any], query: str, schemas: Sequence[str]
) -> Iterator[Iterable[Any]]:
    for start in range(0, len(schemas), SCHEMAS_PER_QUERY):
        some = list(schemas[start : start + SCHEMAS_PER_QUERY])
        with connection.transaction():
            connection.execute("SET LOCAL search_path = pg_catalog")
            connection.execute("SET LOCAL jit = off")
            yield connection.execute(query.encode(), {"schemas": some}).fetchall()
