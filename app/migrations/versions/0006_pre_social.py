"""Create what is around photos: stories, saves, tags, threads, notifications and the search."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006_pre_social"
down_revision = "0005_pre_uploads"
branch_labels = None
depends_on = None

TABLES = (
    "people_index",
    "notifications",
    "inboxes",
    "saves",
    "story_views",
    "stories",
    "tags",
    "photo_tags",
)


def _id(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=nullable, autoincrement=False)


def _time(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False)


def _text(name: str, length: int, collation: str | None = None) -> sa.Column[str]:
    return sa.Column(name, sa.String(length, collation=collation), nullable=False)


def _grams() -> sa.Column[object]:
    return sa.Column("grams", sa.ARRAY(sa.Text()), nullable=False)


def upgrade() -> None:
    """Create the tables and the indexes they are read by."""
    op.add_column("comments", _id("parent_id", nullable=True))
    op.create_table(
        "photo_tags",
        _id("photo_id"),
        _text("tag", 64, "C"),
        _id("source_id"),
        sa.PrimaryKeyConstraint("photo_id", "tag", "source_id", name="photo_tags_pkey"),
    )
    op.create_index("photo_tags_tag_photo_id_idx", "photo_tags", ["tag", sa.text("photo_id DESC")])
    op.create_table(
        "tags",
        _text("name", 64, "C"),
        _id("photo_count"),
        _grams(),
        sa.PrimaryKeyConstraint("name", name="tags_pkey"),
    )
    op.create_index("tags_grams_idx", "tags", ["grams"], postgresql_using="gin")
    op.create_index("tags_photo_count_idx", "tags", [sa.text("photo_count DESC")])
    _stories()
    op.create_table(
        "saves",
        _id("id"),
        _id("user_id"),
        _id("photo_id"),
        _time("saved_at"),
        sa.PrimaryKeyConstraint("id", name="saves_pkey"),
        sa.UniqueConstraint("user_id", "photo_id", name="saves_user_id_photo_id_key"),
    )
    op.create_index("saves_photo_id_idx", "saves", ["photo_id"])
    _notifications()
    op.create_table(
        "people_index",
        _id("user_id"),
        _text("username", 30, "C"),
        _text("document", 400),
        _grams(),
        sa.PrimaryKeyConstraint("user_id", name="people_index_pkey"),
    )
    op.create_index("people_index_username_idx", "people_index", ["username"])
    op.create_index(
        "people_index_words_idx",
        "people_index",
        [sa.text("to_tsvector('simple'::regconfig, document)")],
        postgresql_using="gin",
    )
    op.create_index("people_index_grams_idx", "people_index", ["grams"], postgresql_using="gin")


def _stories() -> None:
    op.create_table(
        "stories",
        _id("id"),
        _id("owner_id"),
        _text("caption", 500),
        _id("width"),
        _id("height"),
        _text("blob_key", 32),
        _time("created_at"),
        _time("expires_at"),
        sa.PrimaryKeyConstraint("id", name="stories_pkey"),
    )
    op.create_index("stories_owner_id_id_idx", "stories", ["owner_id", sa.text("id DESC")])
    op.create_index("stories_expires_at_idx", "stories", ["expires_at"])
    op.create_table(
        "story_views",
        _id("id"),
        _id("story_id"),
        _id("viewer_id"),
        _time("seen_at"),
        sa.PrimaryKeyConstraint("id", name="story_views_pkey"),
        sa.UniqueConstraint("story_id", "viewer_id", name="story_views_story_id_viewer_id_key"),
    )
    op.create_index("story_views_viewer_id_idx", "story_views", ["viewer_id"])


def _notifications() -> None:
    op.create_table(
        "inboxes",
        _id("user_id"),
        _id("last_seq"),
        _id("read_seq"),
        sa.PrimaryKeyConstraint("user_id", name="inboxes_pkey"),
    )
    op.create_table(
        "notifications",
        _id("user_id"),
        _id("seq"),
        _text("kind", 12),
        _id("actor_id"),
        _id("photo_id", nullable=True),
        _id("comment_id", nullable=True),
        _text("source", 80),
        _text("group_key", 80),
        _time("created_at"),
        sa.PrimaryKeyConstraint("user_id", "seq", name="notifications_pkey"),
        sa.UniqueConstraint("user_id", "source", name="notifications_user_id_source_key"),
    )
    op.create_index("notifications_photo_id_idx", "notifications", ["photo_id"])
    op.create_index("notifications_actor_id_idx", "notifications", ["actor_id"])


def downgrade() -> None:
    """Drop the tables; answers become comments like others."""
    for table in TABLES:
        op.drop_table(table)
    op.drop_column("comments", "parent_id")
