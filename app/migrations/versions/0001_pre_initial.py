"""Create every table of the service; the runner gives the schema of the logical shard."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001_pre_initial"
down_revision = None
branch_labels = None
depends_on = None


def _id(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=False, autoincrement=False)


def _time(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False)


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=False, server_default="0")


def upgrade() -> None:
    """Create the tables and the indexes the pages read by."""
    op.create_table(
        "users",
        _id("id"),
        sa.Column("username", sa.String(30), nullable=False),
        sa.Column("display_name", sa.String(60), nullable=False),
        sa.Column("bio", sa.String(300), nullable=False),
        sa.Column("password_hash", sa.String(200), nullable=False),
        _count("photo_count"),
        _count("follower_count"),
        _count("following_count"),
        _time("created_at"),
        sa.PrimaryKeyConstraint("id", name="users_pkey"),
    )
    op.create_index("ix_users_username", "users", ["username"])
    op.create_table(
        "login_sessions",
        _id("id"),
        _id("user_id"),
        sa.Column("token_hash", sa.LargeBinary(32), nullable=False),
        _time("created_at"),
        _time("last_seen_at"),
        _time("expires_at"),
        sa.PrimaryKeyConstraint("id", name="login_sessions_pkey"),
    )
    op.create_index("login_sessions_user_id_idx", "login_sessions", ["user_id"])
    op.create_table(
        "photos",
        _id("id"),
        _id("owner_id"),
        sa.Column("caption", sa.String(2200), nullable=False),
        sa.Column("width", sa.BigInteger(), nullable=False),
        sa.Column("height", sa.BigInteger(), nullable=False),
        sa.Column("blob_key", sa.String(32), nullable=False),
        _count("like_count"),
        _count("comment_count"),
        _time("created_at"),
        sa.PrimaryKeyConstraint("id", name="photos_pkey"),
    )
    op.create_index("photos_owner_id_id_idx", "photos", ["owner_id", sa.text("id DESC")])
    op.create_table(
        "likes",
        _id("photo_id"),
        _id("user_id"),
        _time("created_at"),
        sa.PrimaryKeyConstraint("photo_id", "user_id", name="likes_pkey"),
    )
    op.create_table(
        "comments",
        _id("id"),
        _id("photo_id"),
        _id("author_id"),
        sa.Column("body", sa.String(1000), nullable=False),
        _time("created_at"),
        sa.PrimaryKeyConstraint("id", name="comments_pkey"),
    )
    op.create_index("comments_photo_id_id_idx", "comments", ["photo_id", "id"])
    op.create_table(
        "follows",
        _id("follower_id"),
        _id("followee_id"),
        _time("created_at"),
        sa.PrimaryKeyConstraint("follower_id", "followee_id", name="follows_pkey"),
    )
    op.create_table(
        "followers",
        _id("followee_id"),
        _id("follower_id"),
        _time("created_at"),
        sa.PrimaryKeyConstraint("followee_id", "follower_id", name="followers_pkey"),
    )


def downgrade() -> None:
    """Drop every table."""
    for table in (
        "followers",
        "follows",
        "comments",
        "likes",
        "photos",
        "login_sessions",
        "users",
    ):
        op.drop_table(table)
