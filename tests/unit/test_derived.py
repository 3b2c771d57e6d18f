"""What can be declared as a cached list or count, and what is written to remedy the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import CHAR, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardkit import CachedCount, CachedList, Sharded
from shardkit.cacheable import identity_of
from shardkit.derived import Cached, is_watched, watched_columns
from shardkit.derivedplan import derived_plan
from shardkit.errors import InvalidShardKeyError, NotCacheableError
from shardkit.router import Router


class Base(DeclarativeBase):
    pass


class Photo(Sharded, Base):
    __tablename__ = "photos"
    __shard_key__ = "owner_id"
    owner_id: Mapped[int]
    album: Mapped[str] = mapped_column("album_name")
    rank: Mapped[int | None]
    code: Mapped[str] = mapped_column(CHAR(3))


class Like(Sharded, Base):
    __tablename__ = "likes"
    __shard_key__ = "photo_id"
    photo_id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(primary_key=True)


class Plain(Base):
    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(primary_key=True)


newest = CachedList(Photo.owner_id, order_by=Photo.id.desc(), limit=60)
ranked = CachedList(
    Photo.owner_id, Photo.album, order_by=(Photo.rank.desc().nulls_last(), Photo.code), limit=3
)
likes = CachedCount(Like.photo_id)


def test_what_is_watched_is_what_it_is_made_of() -> None:
    assert newest.watch.key == (":owner_id",)
    assert newest.watch.columns == ("owner_id", "id")
    assert ranked.watch.key == (":owner_id", "s:album_name")
    assert ranked.watch.columns == ("owner_id", "album_name", "id", "rank", "code")
    assert likes.watch.columns == ("photo_id",)
    assert watched_columns(Photo.__table__) == {"owner_id", "album_name", "id", "rank", "code"}  # type: ignore[arg-type]
    assert is_watched(Like.__table__)
    assert not is_watched(Plain.__table__)


def test_the_order_is_whole_and_read_as_it_was_written() -> None:
    text = str(ranked.statement((1, "a")))
    assert "photos.rank DESC NULLS LAST, photos.code ASC, photos.id ASC" in text
    assert [(column.name, how) for column, how in newest.order] == [("id", "DESC")]
    assert newest.values == (Photo.__table__.c.id,)
    of = CachedList(Like.photo_id, order_by=Like.user_id, limit=5)
    assert of.values == (Like.__table__.c.user_id,)


def test_what_differs_has_names_of_its_own() -> None:
    assert newest.watch.number != ranked.watch.number
    longer = CachedList(Photo.owner_id, order_by=Photo.id.desc(), limit=61)
    again = CachedList(Photo.owner_id, order_by=Photo.id.desc(), limit=60, ttl=5)
    assert longer.watch.number != newest.watch.number
    assert again.watch == newest.watch
    numbers = [watch.number for watch in Cached.of(Base.metadata).watches]
    assert numbers.count(newest.watch.number) == 1  # triggers are made once


def test_a_key_places_rows_and_has_one_spelling() -> None:
    router = Router(64)
    assert newest.shard_of(router, (1 << 10,)) == 1
    assert newest.names_row((5,))
    assert not newest.names_row((True,))
    assert not newest.names_row((2**63,))
    assert ranked.identity((5, "a")) == (5, "a")
    with pytest.raises(InvalidShardKeyError, match="2 values, not 1"):
        ranked.identity(5)
    assert identity_of([tag.partition(":")[0] for tag in ranked.watch.key], [5, "a"]) == (5, "a")


def test_entries_come_back_and_others_do_not() -> None:
    plan = derived_plan(newest)
    answered = plan.answered((0, [3, 2], 17, True), [(1, (9,))])
    assert plan.identity(answered) == (9,)
    assert plan.value(answered) == [3, 2]
    assert answered[plan.version_index] == 17
    payload = plan.encode(answered)
    assert payload is not None
    assert plan.decode(payload, 17) == answered
    assert derived_plan(likes).decode(payload, 17) is None
    assert plan.decode(payload[:-1], 17) is None
    assert plan.encode([9, [3, 2], 17, False]) is None  # nobody would say that it is old
    count = derived_plan(likes)
    assert count.decode(count.encode([9, 4, 17, True]) or b"", 17) == [9, 4, 17, True]
    wrong = derived_plan(likes).encode([9, [4], 17, True]) or b""
    assert count.decode(wrong, 17) is None


def test_many_keys_are_one_statement_for_each_server() -> None:
    wanted = [(1, (10,)), (2, (20,)), (1, (11,)), (40, (40,))]
    owners = {1: "a", 2: "a", 40: "b"}

    def group(shards: Any) -> dict[str, list[int]]:
        return {name: [s for s in shards if owners[s] == name] for name in ("a", "b")}

    first, second = derived_plan(likes).questions(wanted, group)
    assert (first[2], second[2]) == (1, 40)
    assert first[1] == {"n_1": [0, 2], "key_0_1": [10, 11], "n_2": [1], "key_0_2": [20]}
    assert str(first[0]).count("UNION ALL") == 1
    assert '"shard_0040"."likes"' in str(second[0])


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: CachedCount(Like.user_id), "keep a table that is sharded by it"),
    (lambda: CachedCount(Plain.id), "a class that derives from Sharded"),
    (lambda: CachedCount(), "columns of one table"),  # noqa: PLW0108 - no arguments
    (lambda: CachedCount("photos.owner_id"), "which is no mapped column"),
    (lambda: CachedCount(Photo.owner_id, Like.photo_id), "columns of one table"),
    (lambda: CachedCount(Photo.owner_id, ttl=0), "give seconds from 1"),
    (lambda: CachedList(Photo.owner_id, order_by=Photo.id, limit=0), "give 1 to 10,000"),
    (lambda: CachedList(Photo.owner_id, order_by=func.lower(Photo.code), limit=5), "by columns"),
    (lambda: CachedList(Photo.owner_id, order_by=Like.user_id, limit=5), "by one of its own"),
    (lambda: CachedList(Photo.owner_id, order_by=Photo.id, of=Like.user_id, limit=5), "same class"),
    (lambda: CachedList(Photo.owner_id, order_by=Photo.id, of=Photo.code, limit=5).watch, "ways"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[text for _, text in REFUSED])
def test_what_cannot_be_kept_says_what_to_write(make: Callable[[], Any], message: str) -> None:
    registered = {t: list(t.info.get("shardkit.derived", ())) for t in Base.metadata.sorted_tables}
    try:
        with pytest.raises(NotCacheableError) as caught:
            make()
        assert message in str(caught.value)
    finally:  # other tests look at what is declared
        for table, declared in registered.items():
            if declared:
                table.info["shardkit.derived"] = declared


def test_a_statement_is_what_any_program_would_write() -> None:
    wanted = select(func.count()).select_from(Like.__table__).where(Like.__table__.c.photo_id == 5)
    assert likes.statement((5,)).compare(wanted)
