"""Tokens: what they ask of replicas, how they merge, and what text they refuse."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.tokens import (
    ASK_PRIMARIES,
    LONGEST,
    NOTHING,
    ONLY_PRIMARY,
    Mark,
    Need,
    Token,
    _check,
    joined,
    merge,
    mint,
    parse,
)

ALPHA, BETA = 0xA, 0xB
HERE = frozenset(range(32))
SYSTEMS = frozenset({ALPHA, BETA})

marks = st.builds(
    Mark,
    system=st.sampled_from([ALPHA, BETA, 0xC, 2**64 - 1]),
    timeline=st.integers(1, 3),
    epoch=st.integers(1, 3),
    lsn=st.integers(0, 2**64 - 1),
    shards=st.none() | st.frozensets(st.integers(0, 63), min_size=1, max_size=8),
)
tokens = st.lists(marks, max_size=4).map(lambda found: joined([Token((m,)) for m in found]))


def checked(text: str) -> str:
    return f"{text}~{_check(text)}"


def need(
    token: Token, system: int = ALPHA, shards: frozenset[int] = HERE, epoch: int = 1
) -> Need | None:
    return token.need(system, shards, epoch=epoch, systems=SYSTEMS)


@given(tokens)
def test_a_token_survives_its_text(token: Token) -> None:
    assert parse(token.text) == token
    assert re.fullmatch(r"[A-Za-z0-9._~-]+", token.text)
    assert len(token.text) <= LONGEST


def strength(found: Need | None) -> tuple[int, int]:
    if found is None:
        return (0, 0)
    return (2, 0) if found == ONLY_PRIMARY else (1, found.lsn)


@given(tokens, tokens, st.sampled_from([ALPHA, BETA]), st.integers(0, 63), st.integers(1, 4))
def test_a_merged_token_asks_for_no_less_than_each(
    one: Token, other: Token, system: int, shard: int, epoch: int
) -> None:
    # One lineage: across two, the higher timeline or epoch replaces the lower on purpose.
    if len({(m.timeline, m.epoch) for m in (*one.marks, *other.marks)}) > 1:
        return
    together = parse(merge(one.text, other.text))
    for part in (one, other):
        asked = need(part, system, frozenset({shard}), epoch)
        assert strength(need(together, system, frozenset({shard}), epoch)) >= strength(asked)


@given(tokens, tokens)
def test_merging_does_not_depend_on_the_order_and_repeats_nothing(one: Token, other: Token) -> None:
    assert merge(one.text, other.text) == merge(other.text, one.text)
    assert merge(one.text, one.text) == one.text


def test_the_later_position_of_a_lineage_counts() -> None:
    early, late = mint(ALPHA, 1, 16, {3: 1}), mint(ALPHA, 1, 24, {3: 1})
    assert merge(early.text, late.text) == late.text == checked("1~a.1.1.18.3")


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (Mark(ALPHA, 1, 1, 99, frozenset({3})), Mark(ALPHA, 2, 1, 7, frozenset({3}))),
        (Mark(ALPHA, 9, 1, 99, frozenset({3})), Mark(BETA, 1, 2, 7, frozenset({3}))),
        (Mark(ALPHA, 1, 1, 99), Mark(ALPHA, 2, 1, 7)),
    ],
    ids=["timeline", "epoch", "whole server"],
)
def test_a_later_lineage_replaces_an_earlier_one(low: Mark, high: Mark) -> None:
    assert joined([Token((low,)), Token((high,))]) == Token((high,))


def test_a_need_is_the_position_on_the_lineage_of_the_shard() -> None:
    token = mint(ALPHA, 1, 24, {3: 1})
    assert need(token) == Need(ALPHA, 1, 24)
    assert need(token, shards=frozenset({4})) is None
    assert need(token, BETA, frozenset({40})) is None


def test_a_shard_written_elsewhere_before_it_moved_asks_the_primary() -> None:
    assert need(mint(ALPHA, 1, 24, {3: 1}), BETA, frozenset({3}), epoch=2) == ONLY_PRIMARY
    whole = Token((Mark(ALPHA, 1, 1, 24),))
    assert need(whole, BETA, frozenset({3}), epoch=2) == ONLY_PRIMARY
    assert need(whole, BETA, frozenset({40}), epoch=1) is None


def test_a_token_of_another_cluster_asks_the_primary_everywhere() -> None:
    foreign = mint(0xF00D, 1, 24, {60: 1})
    assert need(foreign) == need(foreign, BETA) == ONLY_PRIMARY


def test_two_timelines_of_one_server_ask_the_primary() -> None:
    token = joined([mint(ALPHA, 1, 24, {3: 1}), mint(ALPHA, 2, 30, {4: 1})])
    assert need(token) == ONLY_PRIMARY


def test_nothing_asks_for_nothing_and_everything_for_the_primary() -> None:
    assert need(parse(NOTHING)) is None
    assert need(parse(ASK_PRIMARIES)) == ONLY_PRIMARY


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "2~a.1.1.18.3",
        "1~",
        "1~a.1.1.18.",
        "1~a.1.1",
        "1~a.1.1.18.3~",
        "1~a.0.1.18.3",
        "1~a.1.0.18.3",
        "1~a.1.1.18.2000",
        "1~a.1.1.18.5-3",
        "1~a.1.1.18.3-",
        "1~A.1.1.18.3",
        "1~0a.1.1.18.3",
        "1~a.1.1.-18.3",
        "1~a.1.1.18.3 ",
        "1~a.1.1.18.3\n",
        "1~a.100000000.1.18.3",
        "1~11111111111111111.1.1.18.3",
        "0:alpha",
        "\x00",
        "\u0661~a.1.1.18.3",
        "1" * (LONGEST + 1),
        "1~a.1.1.18.3" * 1_000_000,
    ],
    ids=lambda text: text[:20],
)
def test_text_that_is_no_token_asks_the_primary(text: str) -> None:
    good = mint(ALPHA, 1, 24, {3: 1}).text
    for form in (text, checked(text) if text.isascii() else text):
        assert parse(form) == Token(is_readable=False)
        assert merge(good, form) == (ASK_PRIMARIES if form else good)


def test_no_part_of_a_token_is_a_token() -> None:
    text = joined([mint(ALPHA, 1, 0xABCDEF, {3: 1, 9: 1}), mint(BETA, 2, 24, {60: 1})]).text
    assert parse(text).is_readable
    for length in range(2, len(text)):
        assert not parse(text[:length]).is_readable, text[:length]


@given(st.text())
def test_no_text_is_an_error(text: str) -> None:
    assert parse(text).text in {text, ASK_PRIMARIES}


def test_a_token_that_would_be_too_long_is_shortened_and_asks_for_no_less() -> None:
    wide = mint(ALPHA, 1, 24, dict.fromkeys(range(0, 8192, 2), 1))
    assert wide == Token((Mark(ALPHA, 1, 1, 24),))
    many = [mint(system, 1, 24, {system: 1}).text for system in range(1, 400)]
    assert merge(*many) == ASK_PRIMARIES


def test_a_commit_over_shards_of_two_epochs_makes_two_marks() -> None:
    assert mint(ALPHA, 1, 24, {3: 1, 4: 2, 5: 1}).text == checked("1~a.1.1.18.3_5~a.1.2.18.4")
