"""Alembic's entry point, for `alembic revision --autogenerate` against one logical shard.

Whoever calls passes an open connection in `config.attributes["connection"]`, its search path set
to the schema of one logical shard, so revisions name tables without a schema. `shardkit migrate`
does not come here: it renders the revisions itself (docs/migrations.md).
"""

from __future__ import annotations

from alembic import context

from app.tables import Base

target_metadata = Base.metadata


def run() -> None:
    """Run the revisions on the connection given, or print them as SQL."""
    connection = context.config.attributes.get("connection")
    if connection is None:
        context.configure(
            dialect_name="postgresql", target_metadata=target_metadata, literal_binds=True
        )
    else:
        context.configure(connection=connection, target_metadata=target_metadata)
    with context.begin_transaction():
        context.run_migrations()


run()
