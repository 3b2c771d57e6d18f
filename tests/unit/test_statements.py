"""Which logical shards a statement concerns."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import (
    ARRAY,
    BigInteger,
    all_,
    and_,
    any_,
    delete,
    exists,
    func,
    insert,
    literal,
    not_,
    or_,
    select,
    text,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import aliased, join, outerjoin, with_loader_criteria

from shardkit.errors import (
    InvalidShardKeyError,
    NoShardKeyError,
    ShardKeyChangeError,
    UnsupportedStatementError,
)
from shardkit.ids import compose
from shardkit.keys import canonical
from shardkit.router import Router
from shardkit.statements import shards_of
from shardkit.strategies import hash_shard
from tests.models import Country, Handle, Like, Photo, User

ROUTER = Router(64)
A, B, C = (compose(5, shard, 0) for shard in (1, 2, 3))
Other = aliased(Photo)
Photo2, User2 = aliased(Photo), aliased(User)
first_five = select(Photo.owner_id).order_by(Photo.id).limit(5).subquery()
numbered = select(Photo.owner_id, func.row_number().over(order_by=Photo.id).label("n")).subquery()
one_a_rank = select(Photo.owner_id).ext(distinct_on(Photo.rank)).subquery()
ranks = select(Photo.owner_id, Photo.rank).subquery()
ranks_of_a = select(Photo.owner_id, Photo.rank).where(Photo.owner_id == A).subquery()
per_owner = (
    select(Photo.owner_id, func.count().label("n")).group_by(Photo.owner_id).subquery("per_owner")
)


def where(statement: Any, params: Any = None) -> set[int] | None:
    shards = shards_of(statement, params, ROUTER)
    return None if shards is None else set(shards)


ROUTED: list[tuple[str, Any, set[int] | None]] = [
    ("key ==", select(Photo).where(Photo.owner_id == A), {1}),
    ("== turned round", select(Photo).where(literal(A) == Photo.owner_id), {1}),
    ("own id ==", select(Photo).where(Photo.id == B), {2}),
    ("key in", select(Photo).where(Photo.owner_id.in_([A, B])), {1, 2}),
    ("tuples in", select(Like).where(tuple_(Like.user_id, Like.photo_id).in_([(7, A), (8, B)])),
     {1, 2}),
    ("tuples of two placing columns", select(Photo).where(
        tuple_(Photo.id, Photo.owner_id).in_([(A, A), (B, B)]), Photo.owner_id == A), {1}),
    ("tuples without the key", select(Photo).where(
        tuple_(Photo.rank, Photo.caption).in_([(1, "x")])), None),
    ("no tuples", select(Like).where(tuple_(Like.photo_id, Like.user_id).in_([])), {0}),
    ("exists of all", select(exists(select(User.id))), None),
    ("not exists of a key", select(~exists().where(Photo.owner_id == A)), {1}),
    ("exists of several", select(select(Photo).where(Photo.owner_id == A).exists(),
                                 exists(select(User.id).where(User.id.in_([B, C])))), {1, 2, 3}),
    ("exists beside aggregates", select(func.count(Photo.id), exists(
        select(User.id).where(User.id == B))).where(Photo.owner_id == A), {1, 2}),
    ("exists of reference rows", select(exists(select(Country.code))), {0}),
    ("tuples not in", select(Like).where(
        tuple_(Like.photo_id, Like.user_id).not_in([(A, 1)])), None),
    ("any", select(Photo).where(Photo.owner_id == any_(literal([A, B], ARRAY(BigInteger)))),
     {1, 2}),
    ("any of none", select(Photo).where(Photo.owner_id == any_(literal([], ARRAY(BigInteger)))),
     {0}),
    ("all", select(Photo).where(Photo.owner_id == all_(literal([A], ARRAY(BigInteger)))), None),
    ("not any", select(Photo).where(Photo.owner_id != any_(literal([A], ARRAY(BigInteger)))),
     None),
    ("insert for two shards", insert(Photo).values([{"owner_id": A}, {"owner_id": B}]), {1, 2}),
    ("update in", update(Photo).where(Photo.owner_id.in_([A, B])).values(rank=1), {1, 2}),
    ("empty in", select(Photo).where(Photo.owner_id.in_([])), {0}),
    ("and", select(Photo).where(and_(Photo.owner_id == A, Photo.rank > 3)), {1}),
    ("two where", select(Photo).where(Photo.owner_id.in_([A, B])).where(Photo.id == A), {1}),
    ("excluding each other", select(Photo).where(Photo.id == A, Photo.owner_id == B), {0}),
    ("or", select(Photo).where(or_(Photo.owner_id == A, Photo.id == B)), {1, 2}),
    ("or, one side open", select(Photo).where(or_(Photo.owner_id == A, Photo.rank == 1)), None),
    ("not", select(Photo).where(not_(Photo.owner_id == A)), None),
    ("!=", select(Photo).where(Photo.owner_id != A), None),
    ("<", select(Photo).where(Photo.id < A), None),
    ("is null", select(Photo).where(Photo.owner_id == None), None),  # noqa: E711
    ("nothing", select(Photo), None),
    ("a count", select(func.count()).select_from(Photo), None),
    ("a column", select(Photo.caption).where(Photo.id == A), {1}),
    ("hashed key", select(Handle).where(Handle.name == "ana"), {
        hash_shard(canonical("ana"), 64)}),
    ("alias", select(Other).where(Other.id == A), {1}),
    ("join on the key", select(Photo).join(Like, Like.photo_id == Photo.id).where(
        Like.photo_id == A), {1}),
    ("join by relationship", select(User).join(User.photos).where(User.id == A), {1}),
    ("outer join", select(User).outerjoin(User.photos).where(User.id == A), {1}),
    ("value in an outer ON", select(User).outerjoin(
        Photo, and_(Photo.owner_id == User.id, Photo.owner_id == A)), None),
    ("join without values", select(User).join(User.photos), None),
    ("self join", select(Photo).join(Other, Other.owner_id == Photo.owner_id).where(
        Other.id == B), {2}),
    ("correlated exists", select(User).where(exists().where(Photo.owner_id == User.id)), None),
    ("value inside exists", select(Photo).where(
        ~exists().where(Like.photo_id == Photo.id, Like.photo_id == A)), None),
    ("two separate, one shard", select(User).where(User.id == A, exists().where(
        Like.photo_id == A)), {1}),
    ("in a select", select(Photo).where(Photo.id.in_(
        select(Like.photo_id).where(Like.user_id == 3))), None),
    ("scalar subquery", select(User, select(func.count()).where(
        Photo.owner_id == User.id).scalar_subquery()).where(User.id == A), {1}),
    ("subquery column first", select(select(func.count()).where(
        Photo.owner_id == User.id).scalar_subquery(), User), None),
    ("in a select of the same table", select(User).where(User.id.in_(
        select(User.id).where(User.name == "x"))), None),
    ("subquery in FROM", select(User, per_owner.c.n).join(
        per_owner, per_owner.c.owner_id == User.id).where(User.id == A), {1}),
    ("cte", select(select(Photo).where(Photo.owner_id == A).cte()), {1}),
    ("union", union_all(select(Photo).where(Photo.id == A), select(Photo).where(
        Photo.owner_id == A)), {1}),
    ("with a reference table", select(User).join(Country, Country.code == User.name).where(
        User.id == A), {1}),
    ("reference table alone", select(Country), {0}),
    ("update", update(Photo).where(Photo.owner_id == A).values(caption="x"), {1}),
    ("delete", delete(Photo).where(Photo.id.in_([A, C])), {1, 3}),
    ("delete everything", delete(Photo), None),
    ("insert", insert(Photo).values(owner_id=A), {1}),
    ("insert rows", insert(Photo).values([{"owner_id": A}, {"owner_id": A}]), {1}),
    ("value in a join under an outer one", select(User).select_from(outerjoin(User, join(
        Photo, Like, and_(Like.photo_id == Photo.id, Photo.owner_id == A)),
        Photo.owner_id == User.id)), None),
    ("value outside a subquery in FROM", select(ranks).where(
        ranks.c.owner_id == A), {1}),
    ("correlated lateral with a limit", select(User).join(select(Photo.id).where(
        Photo.owner_id == User.id).order_by(Photo.id).limit(3).lateral(), true()).where(
        User.id == A), {1}),
    ("insert or update", upsert(Photo).values(owner_id=A).on_conflict_do_update(
        index_elements=["id"], set_={"caption": "x"}), {1}),
    ("core table", select(Photo.__table__).where(Photo.__table__.c.owner_id == A), {1}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("statement", "shards"), [(s, n) for _, s, n in ROUTED], ids=[name for name, *_ in ROUTED]
)
def test_routed(statement: Any, shards: set[int] | None) -> None:
    assert where(statement) == shards


REFUSED: list[tuple[str, Any, type[Exception]]] = [
    ("join across", select(Photo).join(Like, Like.user_id == Photo.owner_id).where(
        Photo.id == A), UnsupportedStatementError),
    ("cartesian", select(Photo, User).where(Photo.id == A), UnsupportedStatementError),
    ("cartesian, two shards", select(Photo, User).where(Photo.id == A, User.id == B),
     UnsupportedStatementError),
    ("uncorrelated exists", select(User).where(User.id == B, exists().where(Like.photo_id == A)),
     UnsupportedStatementError),
    ("uncorrelated exists over the same table", select(User).where(User.id == A, exists(
        select(User.id).where(User.name == "x"))), UnsupportedStatementError),
    ("uncorrelated scalar over the same table", select(User, select(func.count(User.id))
        .where(User.name == "x").correlate(None).scalar_subquery()).where(User.id == A),
     UnsupportedStatementError),
    ("not in a select", select(Photo).where(Photo.id.not_in(select(Like.photo_id))),
     UnsupportedStatementError),
    ("in a limited select", select(Photo).where(Photo.id.in_(select(Like.photo_id).limit(3))),
     UnsupportedStatementError),
    ("equality of unlike rules", select(Handle).join(
        User, User.id == Handle.name), UnsupportedStatementError),
    ("union over shards", union_all(select(Photo).where(Photo.id == A), select(Photo).where(
        Photo.id == B)), UnsupportedStatementError),
    ("limit in a joined subquery", select(User).join(
        first_five, first_five.c.owner_id == User.id).where(User.id == A),
     UnsupportedStatementError),
    ("limit behind in", select(User).where(User.id == A, User.id.in_(
        select(first_five.c.owner_id))), UnsupportedStatementError),
    ("distinct on in a joined subquery", select(User).join(
        one_a_rank, one_a_rank.c.owner_id == User.id).where(User.id == A),
     UnsupportedStatementError),
    ("distinct on behind in", select(Photo).where(Photo.id == A, Photo.id.in_(
        select(Like.photo_id).ext(distinct_on(Like.user_id)))), UnsupportedStatementError),
    ("window in a joined subquery", select(User).join(
        numbered, numbered.c.owner_id == User.id).where(User.id == A),
     UnsupportedStatementError),
    ("alias of a subquery", select(User, ranks.alias().c.rank).where(User.id == A),
     UnsupportedStatementError),
    ("subquery known by its column", select(User, ranks.c.rank).where(User.id == A),
     UnsupportedStatementError),
    ("subquery twice", select(User).join(ranks, ranks.c.owner_id == User.id).where(
        User.id == A, exists(select(ranks.c.rank).where(ranks.c.rank > 1))),
     UnsupportedStatementError),
    ("not correlated inside a join", select(User).where(User.id == A, exists(
        select(User.id).join(User.photos))), UnsupportedStatementError),
    ("outer join between two others", select(User.id).outerjoin(
        Photo2, Photo2.rank == User.id).outerjoin(
        User2, and_(User2.id == User.id, User2.id == Photo2.owner_id)).where(User.id == A),
     UnsupportedStatementError),
    ("not exists between two others", select(User.id, Photo2.id).where(User.id == A, ~exists().where(
        Photo.owner_id == User.id, Photo.owner_id == Photo2.owner_id)),
     UnsupportedStatementError),
    ("full join of three", select(User.id).select_from(join(User, join(
        Photo, Like, Photo.rank == Like.user_id),
        and_(User.id == Photo.owner_id, User.id == Like.photo_id), full=True)).where(
        User.id == A), UnsupportedStatementError),
    ("outer join with a confined subquery", select(ranks.c.rank).select_from(ranks).outerjoin(
        ranks_of_a, ranks_of_a.c.owner_id == ranks.c.owner_id), UnsupportedStatementError),
    ("a row found on every shard by exists", select(exists(select(Country.code).where(
        exists().where(User.name == Country.code)))), UnsupportedStatementError),
    ("exists beside a value", select(exists(select(User.id)), 1), UnsupportedStatementError),
    ("exists under a condition", select(exists(select(User.id))).where(
        exists(select(Photo.id))), UnsupportedStatementError),
    ("exists of a join elsewhere", select(exists(select(User.id).join(
        Photo, Photo.caption == User.name))), UnsupportedStatementError),
    ("exists of each group", select(Photo.rank, exists(select(User.id))).group_by(Photo.rank),
     UnsupportedStatementError),
    ("either of two", select(exists(select(Photo.id)) | exists(select(User.id))),
     UnsupportedStatementError),
    ("exists of nothing", select(exists(select(1))), NoShardKeyError),
    ("exists of a bad key", select(exists().where(Photo.owner_id == "5")), InvalidShardKeyError),
    ("outer join from a reference table", select(Country).outerjoin(
        User, User.name == Country.code), UnsupportedStatementError),
    ("reference table with exists", select(Country).where(
        exists().where(User.name == Country.code)), UnsupportedStatementError),
    ("join before with_only_columns", select(Photo).join(Like, Like.user_id == Photo.rank).where(
        Photo.id == A).with_only_columns(Photo.id), UnsupportedStatementError),
    ("delete in a CTE", select(User.id, delete(Photo).where(Photo.id == B).returning(
        Photo.id).cte().c.id).where(User.id == A), UnsupportedStatementError),
    ("CTE beside", select(User).where(User.id == A).add_cte(select(Photo).cte()),
     UnsupportedStatementError),
    ("recursive CTE", select(select(User.id).where(User.id == A).cte(recursive=True)),
     UnsupportedStatementError),
    ("loader criteria", select(User).where(User.id == A).options(with_loader_criteria(
        User, User.id.in_(select(Like.user_id)))), UnsupportedStatementError),
    ("update from another table", update(Photo).where(
        Photo.id == A, Photo.caption == User.name).values(rank=1), UnsupportedStatementError),
    ("delete using another table", delete(Photo).where(
        Photo.id == A, Photo.caption == User.name), UnsupportedStatementError),
    ("update returning", update(Photo).where(Photo.id == A).values(rank=1).returning(
        select(func.count(User.id)).scalar_subquery()), UnsupportedStatementError),
    ("insert of an id from elsewhere", insert(Photo).values(owner_id=A, id=B),
     InvalidShardKeyError),
    ("insert of a subquery", insert(Photo).values(owner_id=A, rank=select(
        func.count(User.id)).scalar_subquery()), UnsupportedStatementError),
    ("insert returning", insert(Photo).values(owner_id=A).returning(
        select(func.count(User.id)).scalar_subquery()), UnsupportedStatementError),
    ("insert that moves", upsert(Photo).values(owner_id=A).on_conflict_do_update(
        index_elements=["id"], set_={"owner_id": B}), ShardKeyChangeError),
    ("text", text("select 1"), NoShardKeyError),
    ("no table", select(1), NoShardKeyError),
    ("text as an id", select(Photo).where(Photo.owner_id == "5"), InvalidShardKeyError),
    ("bad value in a list", select(Photo).where(Photo.owner_id.in_([A, -3])),
     InvalidShardKeyError),
    ("key update", update(Photo).where(Photo.id == A).values(owner_id=B), ShardKeyChangeError),
    ("a tuple too short", select(Like).where(
        tuple_(Like.photo_id, Like.user_id).in_([(A,)])), InvalidShardKeyError),
    ("a tuple of the wrong type", select(Like).where(
        tuple_(Like.photo_id, Like.user_id).in_([("x", 1)])), InvalidShardKeyError),
    ("any of nothing", select(Photo).where(
        Photo.owner_id == any_(literal([None], ARRAY(BigInteger)))), InvalidShardKeyError),
    ("insert that goes where it is placed", insert(User).values(name="x"), NoShardKeyError),
    ("insert without key", insert(Photo).values(caption="x"), NoShardKeyError),
    ("insert from select", insert(Photo).from_select(["owner_id"], select(User.id)),
     UnsupportedStatementError),
]  # fmt: skip


@pytest.mark.parametrize(
    ("statement", "error"), [(s, e) for _, s, e in REFUSED], ids=[name for name, *_ in REFUSED]
)
def test_refused(statement: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        where(statement)


def test_values_passed_beside_the_statement_count() -> None:
    from sqlalchemy import bindparam

    statement = select(Photo).where(Photo.owner_id == bindparam("owner"))
    assert where(statement, {"owner": B}) == {2}
    assert where(insert(Photo), [{"owner_id": A}, {"owner_id": A}]) == {1}


def test_a_key_set_by_parameters_is_a_change_too() -> None:
    with pytest.raises(ShardKeyChangeError):
        where(update(Photo).where(Photo.id == A), {"owner_id": B})


def test_values_and_parameters_of_an_insert_count_together() -> None:
    assert where(insert(Photo).values(owner_id=A), [{"id": A}, {"id": A}]) == {1}
    with pytest.raises(InvalidShardKeyError):
        where(insert(Photo).values(owner_id=A), [{"id": B}])


def test_a_list_of_a_hundred_thousand_keys_is_routed() -> None:
    keys = [compose(i + 1, i % 64, 0) for i in range(100_000)]
    assert where(select(Photo).where(Photo.owner_id.in_(keys))) == set(range(64))
