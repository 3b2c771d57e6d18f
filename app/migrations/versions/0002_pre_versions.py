"""Give cached tables the column of the version; `shardkit migrate apply` makes the triggers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002_pre_versions"
down_revision = "0001_pre_initial"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the versions: a constant default is written to no row, so this takes an instant."""
    for table in ("users", "photos"):
        op.add_column(
            table, sa.Column("version", sa.BigInteger(), nullable=False, server_default="0")
        )


def downgrade() -> None:
    """Drop the versions, after the triggers that write them."""
    for table in ("users", "photos"):
        for trigger in ("version", "inserted", "updated", "deleted"):
            op.execute(f"DROP TRIGGER IF EXISTS shardkit_{trigger} ON {table}")
        op.drop_column(table, "version")
