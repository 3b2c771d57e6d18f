"""Puts the schema of a logical shard into compiled SQL.

SQLAlchemy compiles a statement once for all logical shards and puts the schema in each time it
runs, by a regular expression. Here that is one replacement of text, as good as always.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy.dialects.postgresql.psycopg import PGIdentifierPreparer_psycopg

__all__ = ["ANY_SCHEMA", "SchemaPreparer"]

ANY_SCHEMA: Final = "shardkit_any_shard"
"""Stands for the schema of a logical shard in the branch of a scatter; a full stop follows it."""


class SchemaPreparer(PGIdentifierPreparer_psycopg):
    """What quotes identifiers for the engines of `shardkit.connections`."""

    def _render_schema_translates(self, statement: str, schema_translate_map: Any) -> str:
        schema = schema_translate_map.get(None)
        if schema is not None:
            statement = statement.replace("__[SCHEMA__none]", self.quote_schema(schema))
            if "__[SCHEMA_" not in statement:
                return statement
        return super()._render_schema_translates(statement, schema_translate_map)
