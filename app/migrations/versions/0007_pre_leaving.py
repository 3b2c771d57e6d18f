"""Exports and ends of accounts; what log-ins call themselves; who liked and wrote, by person."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007_pre_leaving"
down_revision = "0006_pre_social"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add two tables, a column with a constant default, and indexes that nobody waits for."""
    op.create_table(
        "exports",
        sa.Column("id", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("n_bytes", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="exports_pkey"),
    )
    op.create_index("exports_user_id_idx", "exports", ["user_id"])
    op.create_table(
        "erasures",
        sa.Column("user_id", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("user_id", name="erasures_pkey"),
    )
    op.add_column(
        "login_sessions", sa.Column("client", sa.String(200), nullable=False, server_default="")
    )
    for name, table, column in (
        ("likes_user_id_idx", "likes", "user_id"),
        ("comments_author_id_idx", "comments", "author_id"),
        ("assocs_id2_idx", "assocs", "id2"),
    ):
        op.create_index(name, table, [column], postgresql_concurrently=True)


def downgrade() -> None:
    """Drop them."""
    for name in ("assocs_id2_idx", "comments_author_id_idx", "likes_user_id_idx"):
        op.drop_index(name, postgresql_concurrently=True)
    op.drop_column("login_sessions", "client")
    op.drop_table("erasures")
    op.drop_table("exports")
