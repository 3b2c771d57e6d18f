"""Alembic's entry point; `shardkit migrate` runs it once for every logical shard.

The runner passes an open connection in `config.attributes["connection"]`, its search path set
to the schema of one logical shard, so revisions name tables without a schema. The transaction,
its timeouts and its lock are the runner's.
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
