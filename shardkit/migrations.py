"""What a revision may use besides Alembic's `op`.

    from alembic import op
    from shardkit.migrations import backfill

    def upgrade():
        op.add_column("photos", sa.Column("slug", sa.Text))
        backfill("UPDATE photos SET slug = lower(title) WHERE slug IS NULL")

Called by revisions; runs nothing itself.
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import Delete, Update, text

from shardkit.ops.backfills import tagged

__all__ = ["backfill"]


def backfill(statement: str | Update | Delete, *, rows: int = 10_000) -> None:
    """Change the rows of a large table in batches, each a transaction of its own.

    `shardkit migrate apply` walks the table by its primary key. A batch commits together with how
    far it is, so a run that is killed goes on there; batches grow and shrink to a tenth of a second
    each, wait while a replica is behind, and keep to a rate (`--max-lag`, `--backfill-rate`). Under
    plain Alembic it is an ordinary statement. A batch sees the rows there are when it runs: first
    release the code that writes new rows as they should be.

    Args:
        statement: one UPDATE or DELETE of a table with a primary key, as text or by SQLAlchemy,
            without RETURNING and without a schema.
        rows: of the table that a batch reads at most; fewer where each sets off much work.

    Raises:
        ValueError: the statement is something else.
    """
    context = op.get_context()
    if not isinstance(statement, str):
        statement = str(
            statement.compile(dialect=context.dialect, compile_kwargs={"literal_binds": True})
        )
    marked = tagged(statement, rows=rows)
    if context.as_sql:
        context.impl.static_output(f"{marked};")
    else:
        op.execute(text(marked.replace(":", r"\:")))
