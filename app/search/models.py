"""What people are found by, beside them."""

from __future__ import annotations

from sqlalchemy import ARRAY, Index, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models import Base
from shardkit import Sharded

__all__ = ["PersonEntry"]


class PersonEntry(Sharded, Base):
    """A person as the search knows them; written by the relay.

    Attributes:
        username: the canonical name.
        document: the words of username and display name, folded: what is looked through.
        grams: the trigrams of the document.
    """

    __tablename__ = "people_index"
    __shard_key__ = "user_id"
    __table_args__ = (
        Index("people_index_username_idx", "username"),
        Index(
            "people_index_words_idx",
            text("to_tsvector('simple'::regconfig, document)"),
            postgresql_using="gin",
        ),
        Index("people_index_grams_idx", "grams", postgresql_using="gin"),
    )

    user_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    username: Mapped[str] = mapped_column(String(30, collation="C"))
    document: Mapped[str] = mapped_column(String(400))
    grams: Mapped[list[str]] = mapped_column(ARRAY(Text))
