"""shardkit against one unsharded PostgreSQL: every statement is answered the same, or refused.

The same rows lie in the sharded cluster and in one plain schema. Hypothesis makes statements out
of small parts, and each runs through shardkit and through a plain session. More of them, not the
same every time, and a table of what was refused:

    SHARDKIT_ORACLE_EXAMPLES=50000 pytest tests/property/test_oracle.py -s
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from sqlalchemy import (
    Engine,
    and_,
    create_engine,
    exists,
    func,
    inspect,
    literal,
    not_,
    or_,
    select,
    text,
    true,
    tuple_,
    union,
    union_all,
)
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, aliased

from shardkit import Cluster, all_shards
from shardkit.errors import RoutingError
from shardkit.ids import compose
from shardkit.session import ReadSession
from shardkit.topology import Topology, schema_name
from tests.fixtures.sharded import admin
from tests.models import Base, Country, Like, Photo, User

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning"),  # cartesian products
]

Draw = Callable[[st.SearchStrategy[Any]], Any]

EXAMPLES = int(os.environ.get("SHARDKIT_ORACLE_EXAMPLES", "0"))
SHARDS = (0, 1, 40, 41)  # two on each server
USERS = [compose(10 + i, SHARDS[i % 4], 0) for i in range(7)]
PHOTOS = [
    (compose(100 + i, SHARDS[i % 4], 0), USERS[i % 4 if i % 5 else i % 7 // 4 * 4 + i % 4])
    for i in range(13)
]
PHOTOS = [(photo, owner) for photo, owner in PHOTOS if owner in USERS]
RANKS = (None, 1, 2, 2, 3)
NAMES = ("ana", "bo", "pt")
CAPTIONS = ("", "ana", "dawn")

MODELS = (User, Photo, Like)
KEYS = {User: ("id",), Photo: ("id", "owner_id"), Like: ("photo_id",)}
NUMBERS = {
    User: ("id",), Photo: ("id", "owner_id", "rank"), Like: ("photo_id", "user_id"), Country: (),
}  # fmt: skip
TEXTS = {User: ("name",), Photo: ("caption",), Like: (), Country: ("code", "name")}


def _shard(identity: int) -> int:
    return (identity >> 10) & 8191


def _rows() -> Iterator[tuple[int, str, tuple[Any, ...]]]:
    """Each row with its logical shard and table."""
    for i, user in enumerate(USERS):
        yield _shard(user), "users(id, name)", (user, NAMES[i % 3])
    for i, (photo, owner) in enumerate(PHOTOS):
        row = (photo, owner, CAPTIONS[i % 3], RANKS[i % 5], None)
        yield _shard(photo), "photos(id, owner_id, caption, rank, taken_at)", row
    for i, (photo, _) in enumerate(PHOTOS):
        for fan in {USERS[i % 7], USERS[(i * 3 + 1) % 7]} if i % 3 else ():
            yield _shard(photo), "likes(photo_id, user_id)", (photo, fan)


@pytest.fixture
def single(topology: Topology) -> Iterator[Engine]:
    """One plain schema with all rows; the cluster holds the same ones, by shard."""
    alpha = topology.physical["alpha"]
    for physical in topology.physical.values():
        with admin(physical) as connection:
            for shard, table, row in _rows():
                if topology.shard_map.owner(shard) == physical.name:
                    values = ", ".join(["%s"] * len(row))
                    insert = f"INSERT INTO {schema_name(shard)}.{table} VALUES ({values})"
                    connection.execute(insert.encode(), row)
    engine = create_engine(alpha.admin_url, isolation_level="AUTOCOMMIT").execution_options(
        schema_translate_map={None: "single"}
    )
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA IF EXISTS single CASCADE"))
        connection.execute(text("CREATE SCHEMA single"))
        Base.metadata.create_all(
            connection, [t for t in Base.metadata.sorted_tables if not t.schema]
        )
        for _, table, row in _rows():
            marks = ", ".join(["%s"] * len(row))
            connection.exec_driver_sql(f"INSERT INTO single.{table} VALUES ({marks})", row)
    yield engine
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA single CASCADE"))
    engine.dispose()


# -- parts


def pick(draw: Draw, *choices: Any) -> Any:
    return draw(st.sampled_from(choices))


def chance(draw: Draw, percent: int) -> bool:
    return bool(draw(st.integers(0, 99)) < percent)


def model_of(entity: Any) -> type[Any]:
    return inspect(entity).mapper.class_  # type: ignore[no-any-return]


def entity(draw: Draw, *models: type[Any]) -> Any:
    model = pick(draw, *(models or MODELS))
    return aliased(model) if chance(draw, 40) else model


def beside(draw: Draw, scope: Sequence[Any]) -> Any:
    """Another entity for one FROM; a table can stand there under its own name once."""
    one = entity(draw)
    return aliased(one) if one in scope else one


def number(draw: Draw, scope: Sequence[Any]) -> Any:
    one = pick(draw, *[e for e in scope if NUMBERS[model_of(e)]])
    return getattr(one, pick(draw, *NUMBERS[model_of(one)]))


def key(draw: Draw, one: Any) -> Any:
    return getattr(one, pick(draw, *KEYS[model_of(one)]))


def value(draw: Draw, column: Any) -> Any:
    if column.key == "rank":
        return pick(draw, 1, 2, 3)
    return pick(draw, *USERS) if column.key != "photo_id" else pick(draw, *PHOTOS)[0]


def pinned(draw: Draw, one: Any) -> Any:
    """A condition on a key: what confines a statement."""
    column = key(draw, one)
    names = [photo for photo, _ in PHOTOS] if column.key == "photo_id" else USERS
    if column.key == "id" and model_of(one) is Photo:
        names = [photo for photo, _ in PHOTOS]
    return column == pick(draw, *names) if chance(draw, 60) else column.in_(
        draw(st.lists(st.sampled_from(names), max_size=3))
    )  # fmt: skip


def matching(draw: Draw, a: Any, b: Any) -> Any:
    """A condition between two entities, usually on keys."""
    kind = draw(st.integers(0, 9))
    if kind < 6:
        return key(draw, a) == key(draw, b)
    if kind < 8:
        return number(draw, [a]) == number(draw, [b])
    if kind == 8:
        return or_(key(draw, a) == key(draw, b), number(draw, [a]) < number(draw, [b]))
    return and_(key(draw, a) == key(draw, b), pinned(draw, pick(draw, a, b)))


def condition(draw: Draw, scope: Sequence[Any], depth: int = 2) -> Any:  # noqa: PLR0911 - one for each kind
    """A condition on entities in scope; deeper ones nest."""
    scope = [e for e in scope if model_of(e) is not Country]
    kind = draw(st.integers(0, 15 if depth else 5))
    if kind == 0:
        return pinned(draw, pick(draw, *scope))
    if kind == 1:
        column = number(draw, scope)
        return pick(draw, column.__eq__, column.__ne__, column.__lt__, column.__ge__)(
            value(draw, column)
        )
    if kind == 2:
        column = number(draw, scope)
        values = [value(draw, column) for _ in range(draw(st.integers(0, 3)))]
        return column.in_(values) if chance(draw, 60) else column.not_in(values)
    if kind == 3:
        column = number(draw, scope)
        return column.is_(None) if chance(draw, 50) else column.is_not(None)
    if kind == 4:
        return number(draw, scope) == number(draw, scope)
    if kind == 5:
        one = pick(draw, *scope)
        first, second = number(draw, [one]), number(draw, [one])
        return tuple_(first, second).in_([(value(draw, first), value(draw, second))])
    if kind in (6, 7):
        return pick(draw, and_, or_)(
            condition(draw, scope, depth - 1), condition(draw, scope, depth - 1)
        )
    if kind == 8:
        return not_(condition(draw, scope, depth - 1))
    if kind == 9:
        return related(draw, scope, depth)
    if kind in (10, 11, 12):
        found = exists(subselect(draw, scope, depth - 1))
        return found if chance(draw, 50) else ~found
    if kind in (13, 14):
        column = number(draw, scope)
        inner = subselect(draw, scope, depth - 1)
        return column.in_(inner) if chance(draw, 60) else column.not_in(inner)
    return counted(subselect(draw, scope, depth - 1)) > draw(st.integers(0, 2))


def related(draw: Draw, scope: Sequence[Any], depth: int) -> Any:
    one = pick(draw, *scope)
    model = model_of(one)
    if model is User:
        return one.photos.any(condition(draw, [Photo], depth - 1))
    if model is Like:
        return one.fan.has(condition(draw, [User], depth - 1))
    if chance(draw, 50):
        return one.owner.has(condition(draw, [User], depth - 1))
    return one.likes.any(condition(draw, [Like], depth - 1))


def subselect(draw: Draw, scope: Sequence[Any], depth: int) -> Any:
    """A SELECT of one number, usually correlated, over one or two entities."""
    inner = entity(draw)
    around = [e for e in scope if model_of(e) is not Country]
    own = [inner]
    found = select(key(draw, inner) if chance(draw, 70) else number(draw, [inner]))
    if chance(draw, 25):
        other = beside(draw, own)
        own.append(other)
        found = found.select_from(inner).join(
            other, matching(draw, inner, other), isouter=chance(draw, 40)
        )
    if chance(draw, 75):
        found = found.where(matching(draw, pick(draw, *own), pick(draw, *around)))
    if chance(draw, 15):
        found = found.where(matching(draw, pick(draw, *own), pick(draw, *around)))
    if chance(draw, 40):
        found = found.where(condition(draw, own, depth))
    if chance(draw, 10):
        found = found.order_by(found.selected_columns[0]).limit(draw(st.integers(1, 3)))
    if chance(draw, 10):
        found = found.distinct()
    return found


def counted(inner: Any) -> Any:
    only = inner.with_only_columns(func.count(), maintain_column_froms=True)
    return only.order_by(None).scalar_subquery()


def narrowed(draw: Draw, statement: Any, scope: Sequence[Any]) -> Any:
    """Add conditions, often ones that confine."""
    sharded = [e for e in scope if model_of(e) is not Country]
    if chance(draw, 55):
        statement = statement.where(pinned(draw, pick(draw, *sharded)))
    for _ in range(draw(st.integers(0, 2))):
        statement = statement.where(condition(draw, sharded))
    return statement


def columns(draw: Draw, scope: Sequence[Any]) -> list[Any]:
    chosen: list[Any] = []
    for i, one in enumerate(scope):
        model = model_of(one)
        names = NUMBERS[model] + TEXTS[model]
        for name in draw(st.lists(st.sampled_from(names), max_size=2, unique=True)):
            column = getattr(one, name)
            chosen.append(column.label(f"c{i}_{name}") if chance(draw, 50) else column)
        if chance(draw, 40):
            chosen.append(one)
    if chance(draw, 15):
        rank = number(draw, scope)
        chosen.append((rank + 1).label("next"))
    if chance(draw, 12):
        inner = subselect(draw, scope, 0)
        chosen.append(counted(inner).label("n"))
    if chance(draw, 5):
        chosen.append(exists(subselect(draw, scope, 0)).label("any"))
    return chosen or [scope[0]]


def terms(draw: Draw, scope: Sequence[Any], extra: Sequence[Any] = ()) -> list[Any]:
    """A total order: some columns either way, and last everything that tells rows apart."""
    numbered = [one for one in scope if NUMBERS[model_of(one)]]
    some = [number(draw, numbered) for _ in range(draw(st.integers(0, 2)) if numbered else 0)]
    last = [getattr(one, c.key) for one in scope for c in inspect(model_of(one)).primary_key]
    found = []
    for column in [*some, *last, *extra]:
        term = pick(draw, column, column, column.desc(), column.asc())
        if hasattr(column, "key") and column.key in ("code", "name"):
            term = column.collate("C")
        elif chance(draw, 40):
            term = pick(draw, column.desc(), column.asc())
            term = term.nulls_first() if chance(draw, 50) else term.nulls_last()
        found.append(term)
    return found


def finished(draw: Draw, statement: Any, scope: Sequence[Any], extra: Sequence[Any] = ()) -> Any:
    """Order and limit a statement, sometimes; return it, and whether its order counts."""
    if chance(draw, 50):
        return statement, False
    statement = statement.order_by(*terms(draw, scope, extra))
    if chance(draw, 70):
        statement = statement.limit(draw(st.integers(0, 6)))
    if chance(draw, 40):
        statement = statement.offset(draw(st.integers(0, 4)))
    return statement, True


# -- statements, by kind


def simple(draw: Draw) -> Any:
    scope = [entity(draw)]
    return finished(draw, narrowed(draw, select(*columns(draw, scope)), scope), scope)


def joined(draw: Draw) -> Any:
    scope = [entity(draw)]
    scope.append(beside(draw, scope))
    if chance(draw, 25):
        user = aliased(User)
        scope = [user, Photo]
        statement = select(*columns(draw, scope)).select_from(user)
        statement = statement.join(user.photos, isouter=chance(draw, 40))
        return finished(draw, narrowed(draw, statement, scope), scope)
    statement = select(*columns(draw, scope)).select_from(scope[0])
    on = matching(draw, scope[0], scope[1])
    mode = draw(st.integers(0, 9))
    if mode < 3:
        statement = statement.join(scope[1], on)
    elif mode < 6:
        statement = statement.outerjoin(scope[1], on)
    elif mode < 7:
        statement = statement.outerjoin(scope[1], on, full=True)
    else:
        statement = select(*columns(draw, scope)).where(on)
    if mode < 7 and chance(draw, 30):
        third = beside(draw, scope)
        around = pick(draw, *scope)
        on = matching(draw, third, around)
        if chance(draw, 30):
            on = and_(on, matching(draw, third, scope[0]))
        statement = statement.join(third, on, isouter=chance(draw, 50))
        scope.append(third)
    return finished(draw, narrowed(draw, statement, scope), scope)


def nested_join(draw: Draw) -> Any:
    from sqlalchemy.orm import join, outerjoin

    scope = [entity(draw), aliased(pick(draw, *MODELS)), aliased(pick(draw, *MODELS))]
    first, second, third = scope
    inner_on = matching(draw, second, third)
    if chance(draw, 40):
        inner_on = and_(inner_on, pinned(draw, pick(draw, second, third)))
    inner = pick(draw, join, outerjoin)(second, third, inner_on)
    on = matching(draw, first, pick(draw, second, third))
    outer = pick(draw, join, outerjoin, outerjoin)
    source = outer(inner, first, on) if chance(draw, 30) else outer(first, inner, on)
    if chance(draw, 15):
        source = outerjoin(first, inner, on, full=True)
    statement = select(*columns(draw, scope)).select_from(source)
    return finished(draw, narrowed(draw, statement, scope), scope)


def with_reference(draw: Draw) -> Any:
    one = entity(draw, User, Photo)
    column = one.name if model_of(one) is User else one.caption
    scope = [one, Country] if chance(draw, 60) else [Country, one]
    statement = select(*columns(draw, scope)).select_from(scope[0])
    statement = statement.join(
        scope[1], column == Country.code, isouter=chance(draw, 50), full=chance(draw, 10)
    )
    if chance(draw, 15):
        statement = select(Country).where(
            exists().where(column == Country.code, condition(draw, [one], 1))
        )
        return finished(draw, statement, [Country])
    return finished(draw, narrowed(draw, statement, scope), scope)


def subqueries(draw: Draw) -> Any:
    scope = [entity(draw)]
    if chance(draw, 10):
        inner = subselect(draw, [User], 1)
        return select(pick(draw, exists(inner), counted(inner))), False
    if chance(draw, 30):
        scope.append(beside(draw, scope))
    statement = select(*columns(draw, scope))
    if len(scope) == 2 and chance(draw, 60):
        statement = statement.where(key(draw, scope[0]) == key(draw, scope[1]))
    inner = subselect(draw, scope, 1)
    column = number(draw, scope)
    clause = pick(draw, exists(inner), ~exists(inner), column.in_(inner), column.not_in(inner))
    return finished(draw, narrowed(draw, statement.where(clause), scope), scope)


def derived(draw: Draw) -> Any:  # noqa: C901, PLR0912, PLR0915 - as above
    scope = [entity(draw)]
    inner = entity(draw)
    names = NUMBERS[model_of(inner)]
    found = select(
        *[
            getattr(inner, name).label(f"d_{name}") if chance(draw, 40) else getattr(inner, name)
            for name in names
        ]
    )
    kind = draw(st.integers(0, 9))
    is_lateral = kind == 0
    if kind == 1:
        grouped = getattr(inner, pick(draw, *names))
        found = select(grouped, func.count().label("n")).group_by(grouped)
    if chance(draw, 30):
        found = found.where(pinned(draw, inner))
    if chance(draw, 20):
        found = found.where(condition(draw, [inner], 1))
    if is_lateral:
        found = found.where(matching(draw, inner, scope[0]))
    if kind in (0, 2, 3):
        keys = [getattr(inner, c.key) for c in inspect(model_of(inner)).primary_key]
        found = found.order_by(*keys).limit(draw(st.integers(1, 3)))
    if kind == 4:
        found = found.add_columns(
            func.row_number().over(order_by=getattr(inner, names[0])).label("n")
        )
    if kind == 5:
        keys = [getattr(inner, c.key) for c in inspect(model_of(inner)).primary_key]
        found = found.ext(distinct_on(getattr(inner, names[-1]))).order_by(
            getattr(inner, names[-1]), *keys
        )
    table: Any = found.lateral() if is_lateral else pick(draw, found.subquery, found.cte)()
    if chance(draw, 20):
        table = table.alias()
    first = next(iter(table.c))
    passed = [c for c in table.c if c.key != "n"]
    chosen = [*columns(draw, scope)] if chance(draw, 60) else []
    statement = select(*chosen, first) if chance(draw, 50) else select(*chosen, *table.c)
    mode = draw(st.integers(0, 9))
    on = true() if is_lateral else pick(draw, *passed) == key(draw, scope[0])
    if chance(draw, 10) and not is_lateral:
        on = pick(draw, *passed) == number(draw, scope)
    if mode < 4:
        statement = statement.select_from(scope[0]).join(table, on)
    elif mode < 6:
        statement = statement.select_from(scope[0]).outerjoin(table, on)
    elif mode < 7 and not is_lateral:
        statement = statement.select_from(table).outerjoin(scope[0], on)
    elif mode < 8 and not chosen:
        scope = []
    elif mode < 9 and not is_lateral:
        column = number(draw, scope)
        statement = select(*columns(draw, scope)).where(column.in_(select(pick(draw, *passed))))
    elif not is_lateral:
        other = table.alias()
        statement = select(*other.c).select_from(table).join(
            other, pick(draw, *passed) == other.c[first.key], isouter=chance(draw, 50)
        )  # fmt: skip
        if chance(draw, 50):
            statement = statement.where(exists(select(table.c[first.key]).where(first > 0)))
        scope = []
    else:
        statement = statement.select_from(scope[0]).join(table, on)
    return (narrowed(draw, statement, scope) if scope else statement), False


def unions(draw: Draw) -> Any:
    parts = []
    for _ in range(2):
        one = entity(draw)
        part = select(number(draw, [one]).label("x"))
        parts.append(narrowed(draw, part, [one]))
    together = pick(draw, union, union_all)(*parts)
    if chance(draw, 40):
        outer = entity(draw)
        inside = together.subquery() if chance(draw, 50) else together
        if inside is together:
            return narrowed(
                draw, select(outer).where(key(draw, outer).in_(together)), [outer]
            ), False
        found = select(outer, inside.c.x).join(inside, inside.c.x == key(draw, outer))
        return narrowed(draw, found, [outer]), False
    return together, False


def aggregates(draw: Draw) -> Any:
    scope = [entity(draw)]
    statement = select(literal(1))
    if chance(draw, 30):
        scope.append(beside(draw, scope))
    grouped = [number(draw, scope) for _ in range(draw(st.integers(0, 2)))]
    chosen: list[Any] = [*grouped]
    for i in range(draw(st.integers(1, 3))):
        column = number(draw, scope)
        made = pick(
            draw, func.count(), func.count(column), func.sum(column), func.min(column),
            func.max(column), func.count(column.distinct()), func.avg(column),
            func.bool_and(column > 2), func.bool_or(column == 2), func.avg(column * -3),
        )  # fmt: skip
        chosen.append(made.label(f"a{i}") if chance(draw, 50) else made)
    statement = select(*chosen).select_from(scope[0])
    if len(scope) == 2:
        statement = statement.join(
            scope[1], matching(draw, scope[0], scope[1]), isouter=chance(draw, 40)
        )
    statement = narrowed(draw, statement.group_by(*grouped), scope)
    if chance(draw, 30):
        statement = statement.having(having(draw, scope, grouped))
    if grouped and chance(draw, 60):
        last = [column.desc() if chance(draw, 50) else column for column in grouped]
        some = [chosen[-1].desc()] if chance(draw, 50) else []
        statement = statement.order_by(*some, *last)
        if chance(draw, 60):
            statement = statement.limit(draw(st.integers(0, 4))).offset(draw(st.integers(0, 2)))
        return statement, True
    return statement, False


def having(draw: Draw, scope: Sequence[Any], grouped: Sequence[Any]) -> Any:
    column = number(draw, scope)
    tests = [
        func.count() > draw(st.integers(0, 3)),
        func.sum(column) <= draw(st.integers(0, 9)),
        func.avg(column) >= draw(st.integers(0, 3)),
        func.max(column).is_(None),
        not_(func.min(column) != 1),
        *(one == 2 for one in grouped),
        *(one.is_not(None) for one in grouped),
    ]
    first, second = pick(draw, *tests), pick(draw, *tests)
    return pick(draw, first, and_(first, second), or_(first, second), not_(or_(first, second)))


def distincts(draw: Draw) -> Any:
    scope = [entity(draw)]
    statement = narrowed(draw, select(*columns(draw, scope)).distinct(), scope)
    return statement, False


def windows(draw: Draw) -> Any:
    scope = [entity(draw)]
    ranked = pick(draw, func.row_number, func.rank, func.count)()
    over = ranked.over(order_by=terms(draw, scope))
    if chance(draw, 50):
        return narrowed(draw, select(*columns(draw, scope), over), scope), False
    return narrowed(draw, select(*columns(draw, scope)), scope).order_by(over.desc()), True


KINDS: dict[str, Callable[[Draw], Any]] = {
    "filter": simple,
    "join": joined,
    "nested join": nested_join,
    "reference table": with_reference,
    "subquery": subqueries,
    "derived table": derived,
    "union": unions,
    "aggregate": aggregates,
    "distinct": distincts,
    "window": windows,
}
WEIGHTED = [*KINDS, "filter", "join", "join", "subquery", "subquery", "derived table", "aggregate"]


@st.composite
def statements(draw: Any) -> tuple[str, Any, bool]:
    kind = draw(st.sampled_from(WEIGHTED))
    statement, is_ordered = KINDS[kind](draw)
    return kind, statement, is_ordered


# -- comparison


def plain(item: Any) -> Any:
    state = inspect(item, raiseerr=False)
    if state is None or not hasattr(state, "mapper"):
        return item
    mapper = state.mapper
    return (mapper.class_.__name__, *(getattr(item, a.key) for a in mapper.column_attrs))


def answer(session: Session, statement: Any) -> tuple[list[str], list[tuple[Any, ...]]]:
    session.expunge_all()
    result = session.execute(statement)
    return list(result.keys()), [tuple(plain(item) for item in row) for row in result]


def test_every_statement_is_answered_as_by_one_server_or_refused(
    cluster: Cluster, single: Engine
) -> None:
    answered: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    invalid: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES or 1500,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(statements())
    def check(made: tuple[str, Any, bool]) -> None:
        kind, statement, is_ordered = made
        try:
            expected = answer(reference, statement)
        except SQLAlchemyError:
            invalid[kind] += 1  # no SQL: PostgreSQL or SQLAlchemy says so
            return
        note(str(statement))
        try:
            found = answer(sharded, statement.options(all_shards()))
        except RoutingError:
            refused[kind] += 1
            return
        answered[kind] += 1
        assert found[0] == expected[0]
        if is_ordered:
            assert found[1] == expected[1]
        else:
            assert Counter(found[1]) == Counter(expected[1])

    with cluster.reader(max_lag=1.0) as sharded, Session(single) as reference:
        assert isinstance(sharded, ReadSession)
        check()
    report(answered, refused, invalid)
    assert all(answered[kind] for kind in KINDS), answered


def report(answered: Counter[str], refused: Counter[str], invalid: Counter[str]) -> None:
    """Print how many statements of each kind were answered and refused."""
    print(f"\n{'kind':16}{'answered':>10}{'refused':>10}{'invalid':>10}{'share refused':>15}")
    for kind in [*KINDS, "all"]:
        yes, no, none = (
            sum(count.values()) if kind == "all" else count[kind]
            for count in (answered, refused, invalid)
        )
        print(f"{kind:16}{yes:10}{no:10}{none:10}{no / max(1, yes + no):15.0%}")
