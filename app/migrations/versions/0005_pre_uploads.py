"""Remember uploads that take their time, and which photos there are as WebP."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005_pre_uploads"
down_revision = "0004_post_follows"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a table, and a column whose constant default is written to no row."""
    op.create_table(
        "uploads",
        sa.Column("id", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("owner_id", sa.BigInteger(), nullable=False),
        sa.Column("photo_id", sa.BigInteger(), nullable=True),
        sa.Column("problem_type", sa.String(100), nullable=False, server_default=""),
        sa.Column("problem_detail", sa.String(500), nullable=False, server_default=""),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="uploads_pkey"),
    )
    op.create_index("uploads_owner_id_idx", "uploads", ["owner_id"])
    op.add_column(
        "photos", sa.Column("has_webp", sa.Boolean(), nullable=False, server_default=sa.false())
    )


def downgrade() -> None:
    """Drop both."""
    op.drop_column("photos", "has_webp")
    op.drop_table("uploads")
