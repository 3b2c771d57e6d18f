"""What may be declared unique, which values are one, and where statements about them go."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import CHAR, String, and_, any_, bindparam, not_, or_, select, tuple_
from sqlalchemy.dialects.postgresql import ARRAY, CITEXT
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardkit import Sharded, unique_lookup
from shardkit.emitting import pending
from shardkit.errors import ConfigurationError, InvalidUniqueValueError, UnsupportedStatementError
from shardkit.fingerprints import Fingerprints
from shardkit.ids import compose
from shardkit.models import rules_of
from shardkit.router import Router, UnknownValuesError
from shardkit.statements import shards_of
from shardkit.uniques import (
    GIVEN_UP,
    MAX_VALUE_BYTES,
    Value,
    folded,
    given_up,
    lookups_of,
    was_given_up,
)
from tests.models import Account, Base, Photo

TABLE: Any = Account.__table__
NAME, EMAIL = lookups_of(TABLE)
ANA, BO = NAME.value("ana"), NAME.value("bo")
A = compose(5, 1, 0)
KNOWN = Router(
    64, values={ANA: frozenset({1}), BO: frozenset({2}), EMAIL.value("a@b"): frozenset()}
)


# -- values


@given(st.text(max_size=200))
def test_folding_twice_is_folding_once(text: str) -> None:
    for fold in ("exact", "nfc", "nfkc", "casefold"):
        once = folded(text, cast("Any", fold))
        assert folded(once, cast("Any", fold)) == once


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ana", "aNA"),
        ("\uff21na", "ana"),
        ("stra\xdfe", "STRASSE"),
        ("e\u0301", "\xc9"),
        ("\u03c3", "\u03c2"),
    ],
)
def test_casefold_makes_one_of_them(one: str, other: str) -> None:
    assert NAME.value(one) == NAME.value(other)
    assert NAME.value(one).home(64) == NAME.value(other).home(64)
    assert EMAIL.value(one) != EMAIL.value(other)


def test_columns_have_values_of_their_own() -> None:
    assert NAME.value("ana") != EMAIL.value("ana")


def test_the_limit_counts_what_is_kept() -> None:
    assert len(NAME.value("x" * MAX_VALUE_BYTES).key) == MAX_VALUE_BYTES + 1
    for long in ("x" * (MAX_VALUE_BYTES + 1), "\xe9" * 600, "\ufdfa" * 100):
        with pytest.raises(InvalidUniqueValueError):
            NAME.value(long)


# -- declarations


def declared(unique: Any, column: Any, **more: Any) -> type[Any]:
    class Own(DeclarativeBase):
        pass

    body = {
        "__tablename__": "things",
        "__unique__": unique,
        "__annotations__": {"name": Mapped[str]},
        "name": column,
        **more,
    }
    return type("Thing", (Sharded, Own), body)


@pytest.mark.parametrize(
    ("unique", "column", "more", "message"),
    [
        ((unique_lookup("nome"),), mapped_column(), {}, "names no mapped column"),
        (unique_lookup("name"), mapped_column(), {}, "comma"),
        ((unique_lookup("id"),), mapped_column(), {}, "places its row"),
        ((unique_lookup("name"),), mapped_column(default="x"), {}, "has a default"),
        ((unique_lookup("name"),), mapped_column(server_default="x"), {}, "has a default"),
        ((unique_lookup("name"),), mapped_column(CITEXT), {}, "cannot be unique"),
        ((unique_lookup("name"),), mapped_column(CHAR(5)), {}, "cannot be unique"),
        (
            (unique_lookup("name"),),
            mapped_column(),
            {"__shard_key__": "k", "__shard_strategy__": "hash", "k": mapped_column(String, primary_key=True)},
            "needs an id that carries its shard",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(
    unique: Any, column: Any, more: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigurationError, TypeError)) as caught:
        declared(unique, column, **more)
    assert message in str(caught.value) or isinstance(caught.value, TypeError)


def test_a_way_to_fold_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="casefold"):
        unique_lookup("name", fold=cast("Any", "lower"))


def test_folding_is_recorded_and_another_one_refused() -> None:
    rules = rules_of(Base.metadata)
    assert rules["accounts.name"] == "unique text casefold"
    assert rules["accounts.email"] == "unique text exact"
    fingerprints = Fingerprints()
    fingerprints.note(rules | {"accounts.name": "unique text exact"})
    with pytest.raises(ConfigurationError, match=r"restore unique_lookup"):
        fingerprints.check(cast("Any", Account.__mapper__))


# -- statements


@pytest.mark.parametrize(
    ("where", "shards"),
    [
        (Account.name == "ana", {1}),
        (Account.name == "ANA", {1}),
        ("ana" == Account.name, {1}),
        (Account.name.in_(["ana", "bo"]), {1, 2}),
        (Account.name == any_(bindparam(None, ["ana", "bo"], type_=ARRAY(String))), {1, 2}),
        (or_(Account.name == "ana", Account.name == "bo"), {1, 2}),
        (and_(Account.name == "ana", Account.bio == "x"), {1}),
        (and_(Account.name == "ana", Account.name == "bo"), {0}),
        (Account.email == "a@b", {EMAIL.value("a@b").home(64)}),
        (and_(Account.id == A, Account.name == "never looked up"), {1}),
        (Account.name != "ana", None),
        (Account.name > "ana", None),
        (not_(Account.name.in_(["ana"])), None),
        (or_(Account.name == "ana", Account.bio == "x"), None),
        (Account.name == Account.email, None),
        (Account.name.is_(None), None),
        (tuple_(Account.name, Account.bio).in_([("ana", "x")]), None),
    ],
)
def test_where_a_statement_about_values_goes(where: Any, shards: set[int] | None) -> None:
    found = shards_of(select(Account).where(where), None, KNOWN)
    assert (None if found is None else set(found)) == shards


def test_values_that_are_not_known_are_asked_for_together() -> None:
    wanted = select(Account).where(Account.name.in_(["ana", "cy", "di"]))
    with pytest.raises(UnknownValuesError) as caught:
        shards_of(wanted, None, KNOWN)
    assert set(caught.value.values) == {NAME.value("cy"), NAME.value("di")}


def test_a_join_on_the_shard_key_follows_the_value() -> None:
    joined = select(Photo).join(Account, Photo.owner_id == Account.id)
    assert shards_of(joined.where(Account.name == "ana"), None, KNOWN) == frozenset({1})
    elsewhere = select(Photo).join(Account, Photo.caption == Account.name)
    with pytest.raises(UnsupportedStatementError):
        shards_of(elsewhere.where(Account.name == "ana"), None, KNOWN)


def test_a_value_in_a_subquery_confines_the_subquery_alone() -> None:
    inner = select(Account.id).where(Account.name == "ana")
    around = select(Photo).where(Photo.owner_id.in_(inner))
    assert shards_of(around, None, KNOWN) is None


# -- what relays are told


@given(
    st.sampled_from([NAME, EMAIL]),
    st.dictionaries(st.text(min_size=1, max_size=50), st.sets(st.integers(0, 2**63 - 1))),
)
def test_what_is_told_of_values_is_what_is_heard(lookup: Any, texts: dict[str, set[int]]) -> None:
    values: dict[Value, set[int]] = {}
    for text, row_ids in texts.items():
        with suppress(InvalidUniqueValueError):
            values.setdefault(lookup.value(text), set()).update(row_ids)
    heard: dict[Value, frozenset[int]] = {}
    for payload in given_up(lookup, values):
        heard |= was_given_up(json.loads(json.dumps(payload)))
    assert heard == values


def test_the_longest_values_fit_into_events() -> None:
    values = {EMAIL.value(f"{n:04d}" * (MAX_VALUE_BYTES // 4)): {2**63 - 1} for n in range(1000)}
    told = list(given_up(EMAIL, values))
    assert len(told) <= 1000 / 10
    for payload in told:
        pending(GIVEN_UP, payload, key=None, near=1)  # which refuses what is too large
