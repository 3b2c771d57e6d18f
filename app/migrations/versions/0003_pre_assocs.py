"""Create the table of edges with those there are, and what a person chooses; slots of likes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003_pre_assocs"
down_revision = "0002_pre_versions"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create and copy. Stop who writes follows meanwhile, or run `python -m app.repair` after."""
    op.create_table(
        "assocs",
        sa.Column("id1", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("atype", sa.SmallInteger(), nullable=False, autoincrement=False),
        sa.Column("id2", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("id1", "atype", "id2", name="assocs_pkey"),
    )
    op.create_index(
        "assocs_newest_idx", "assocs", ["id1", "atype", sa.text("at DESC"), sa.text("id2 DESC")]
    )
    op.execute(
        "INSERT INTO assocs (id1, atype, id2, at) SELECT follower_id, 1, followee_id, "
        "CAST(extract(epoch FROM created_at) * 1000 AS bigint) FROM follows"
    )
    op.execute(
        "INSERT INTO assocs (id1, atype, id2, at) SELECT followee_id, 2, follower_id, "
        "CAST(extract(epoch FROM created_at) * 1000 AS bigint) FROM followers"
    )
    op.create_table(
        "like_slots",
        sa.Column("photo_id", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("slot", sa.SmallInteger(), nullable=False, autoincrement=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("photo_id", "slot", name="like_slots_pkey"),
    )
    op.create_table(
        "ads",
        sa.Column("id", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("owner_id", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("photo_id", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("bid", sa.Float(53), nullable=False),
        sa.Column("begins_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ends_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="ads_pkey"),
    )
    op.execute(
        "INSERT INTO like_slots (photo_id, slot, n) "
        "SELECT id, 0, like_count FROM photos WHERE like_count <> 0"
    )
    for name in ("is_private", "is_feed_ranked"):
        op.add_column(
            "users", sa.Column(name, sa.Boolean(), nullable=False, server_default=sa.false())
        )


def downgrade() -> None:
    """Drop what was added; follows made since then are lost."""
    for name in ("is_private", "is_feed_ranked"):
        op.drop_column("users", name)
    op.drop_table("ads")
    op.drop_table("like_slots")
    op.drop_table("assocs")
