"""Drop the tables of follows, which are edges in `assocs` now."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004_post_follows"
down_revision = "0003_pre_assocs"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Drop the tables with the triggers of their counts."""
    op.drop_table("follows")
    op.drop_table("followers")


def downgrade() -> None:
    """Create the tables again, with the edges there are."""
    for table, near, far, kind in (
        ("follows", "follower_id", "followee_id", 1),
        ("followers", "followee_id", "follower_id", 2),
    ):
        op.create_table(
            table,
            sa.Column(near, sa.BigInteger(), nullable=False, autoincrement=False),
            sa.Column(far, sa.BigInteger(), nullable=False, autoincrement=False),
            sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
            sa.PrimaryKeyConstraint(near, far, name=f"{table}_pkey"),
        )
        op.execute(
            f"INSERT INTO {table} ({near}, {far}, created_at) "  # noqa: S608 - our own names
            f"SELECT id1, id2, to_timestamp(at / 1000.0) FROM assocs WHERE atype = {kind}"
        )
