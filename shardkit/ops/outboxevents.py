"""Parts of the triggers that write events of the cache into the outbox, as SQL.

Shared by the triggers of rows (`cachetriggers`) and those of lists and counts (`derivedtriggers`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from psycopg import sql

from shardkit.cacheable import CHANGED
from shardkit.emitting import CHANNEL, EPOCH_SHIFT, POSITION, SLEEPING
from shardkit.topology import schema_name

__all__ = ["noticed", "said", "said_few"]

_ROWS_PER_EVENT: Final = 1000
_NOTHING: Final = sql.SQL("")

# `cache_since` is where the transaction's first event is at the earliest: whoever asks for them
# begins there.
_NOTICED: Final = """IF coalesce(current_setting('shardkit.cache_since', true), '') = '' THEN
        PERFORM set_config('shardkit.cache_since',
            coalesce(pg_sequence_last_value({position}), 0)::text, true);
    END IF;"""

_NOTIFIED: Final = """IF FOUND AND coalesce(current_setting('shardkit.quiet', true), '') <> 'on'
        AND NOT pg_try_advisory_xact_lock_shared({sleeping})
    THEN
        PERFORM pg_notify({channel}, {number});
    END IF;"""

# Row locks on what is inserted. Ids are negative: nobody mints such. While the logical shard is not
# this server's to write, only copies are made, which say nothing.
_SAY: Final = """
    INSERT INTO {schema}.shardkit_outbox (position, id, topic, payload)
    SELECT e.place, -e.place, {topic}, e.payload FROM (
        SELECT (o.epoch << {shift}) + nextval({position}) AS place, c.payload
        FROM shardkit.ownership AS o, (
            SELECT json_build_object('table', {name}, 'tags', {tags}::json,
                'transaction', pg_current_xact_id()::text, 'rows', json_agg(d.change)) AS payload
            FROM (SELECT json_build_array(json_build_array({columns}), {version}) AS change,
                    (row_number() OVER () - 1) / {most} AS n
                FROM {rows} AS r {condition}) AS d
            GROUP BY d.n) AS c
        WHERE o.logical_shard = {shard} AND o.state = 'active' OFFSET 0) AS e"""


# The same for what nearly every statement changes: a few rows, in one event. It takes two thirds of
# the time, so it is tried first; it says nothing where there are none or too many.
_SAY_FEW: Final = """
    INSERT INTO {schema}.shardkit_outbox (position, id, topic, payload)
    SELECT e.place, -e.place, {topic}, e.payload FROM (
        SELECT (SELECT o.epoch << {shift} FROM shardkit.ownership AS o
                WHERE o.logical_shard = {shard} AND o.state = 'active')
                + nextval({position}) AS place,
            json_build_object('table', {name}, 'tags', {tags}::json,
                'transaction', pg_current_xact_id()::text,
                'rows', json_agg(json_build_array(json_build_array({columns}), {version})))
                AS payload
        FROM {rows} AS r {condition} HAVING count(*) BETWEEN 1 AND {most} OFFSET 0) AS e
    WHERE e.place IS NOT NULL"""


def said(
    logical_shard: int,
    *,
    name: str,
    tags: Sequence[str],
    columns: Sequence[sql.Composable],
    version: sql.Composable,
    rows: sql.Composable,
    condition: sql.Composable = _NOTHING,
    template: str = _SAY,
) -> sql.Composed:
    """Return what writes one event of changed rows; more for many rows.

    Args:
        logical_shard: whose outbox.
        name: of the table, or of the list.
        tags: how the values of the keys are read from JSON.
        columns: the values of a key, of a row `r`.
        version: that the row has now, or is gone with.
        rows: what has changed.
        condition: on a row `r`.
        template: the SQL.
    """
    return sql.SQL(template).format(
        schema=sql.Identifier(schema_name(logical_shard)),
        topic=sql.Literal(CHANGED),
        shift=EPOCH_SHIFT,
        position=sql.Literal(POSITION),
        name=sql.Literal(name),
        tags=sql.Literal(json.dumps(list(tags))),
        columns=sql.SQL(", ").join(columns),
        version=version,
        most=_ROWS_PER_EVENT,
        rows=rows,
        condition=condition,
        shard=logical_shard,
    )


def said_few(logical_shard: int, **what: Any) -> sql.Composed:
    """Return the same for a few rows, which is quicker: it writes nothing for none or many."""
    return said(logical_shard, template=_SAY_FEW, **what)


def noticed(logical_shard: int) -> tuple[sql.Composed, sql.Composed]:
    """Return what notes where a transaction's events begin, and what wakes a relay after one."""
    return (
        sql.SQL(_NOTICED).format(position=sql.Literal(POSITION)),
        sql.SQL(_NOTIFIED).format(
            sleeping=SLEEPING,
            channel=sql.Literal(CHANNEL),
            number=sql.Literal(str(logical_shard)),
        ),
    )
