"""The machines of the cache protocol, step by step; `test_cache_model` has the interleavings."""

from __future__ import annotations

import pytest

from shardkit.cache import REPAIR_ROUNDS, Lives, Patience, Phase, Reader, Repair, Source, Writer
from shardkit.caching.operations import UNKNOWN, Answer, Kind, Op, Outcome, Request

DONE = Answer(Outcome.DONE)
DIFFERS = Answer(Outcome.DIFFERS)
NOTHING = Answer(Outcome.NOTHING)
LIVES = Lives(value=60.0, absence=2.0, marker=4.0)


def found(kind: Kind, version: int = 0, payload: bytes = b"", cas: object = "c") -> Answer:
    return Answer(Outcome.FOUND, cas, kind, version, payload)


def marked(payload: bytes | None = b"new") -> Writer:
    writer = Writer.begin("k", 5, payload, lives=LIVES)
    assert writer.request == Request(Op.PUT, "k", None, Kind.MARKER, 5, b"", 4.0)
    writer = writer.advance(Answer(Outcome.DONE, "m"))
    assert writer.is_ready
    assert writer.request is None
    return writer


def test_a_writer_stores_on_its_marker() -> None:
    writer = marked().committed()
    assert writer.request == Request(Op.STORE, "k", "m", Kind.VALUE, 5, b"new", 60.0)
    assert writer.advance(DONE).is_clean


def test_a_deleted_row_leaves_no_entry() -> None:
    writer = marked(None).committed()
    assert writer.request == Request(Op.REMOVE, "k", "m")
    assert writer.advance(DONE).is_clean


def test_a_rollback_takes_the_marker_away_and_nothing_else() -> None:
    writer = marked().rolled_back()
    assert writer.request == Request(Op.REMOVE, "k", "m")
    assert writer.advance(DONE).is_done
    lost = Writer.begin("k", 5, b"new").advance(UNKNOWN)
    assert lost.is_ready
    assert lost.rolled_back().is_done


def test_an_unknown_commit_touches_nothing() -> None:
    assert marked().unknown().request is None
    assert marked().unknown().is_done


@pytest.mark.parametrize("answer", [DIFFERS, UNKNOWN])
def test_a_marker_that_is_gone_means_repair(answer: Answer) -> None:
    writer = marked().committed().advance(answer)
    assert not writer.is_done
    assert writer.request == Request(Op.READ, "k")
    assert writer.advance(NOTHING).is_clean


def test_a_marker_that_was_not_confirmed_means_repair() -> None:
    writer = Writer.begin("k", 5, b"new").advance(UNKNOWN).committed()
    assert writer.request == Request(Op.READ, "k")


@pytest.mark.parametrize(
    ("entry", "stays"),
    [
        (found(Kind.VALUE, 5), True),
        (found(Kind.VALUE, 6), True),
        (found(Kind.VALUE, 4), False),
        (found(Kind.MARKER, 6), True),
        (found(Kind.MARKER, 5), False),
        (found(Kind.MARKER, 4), False),
        (found(Kind.LEASE), False),
        (found(Kind.ABSENCE), False),
        (found(Kind.GARBAGE), False),
        (NOTHING, True),
    ],
)
def test_what_a_repair_leaves(entry: Answer, stays: bool) -> None:
    repair = Repair("k", 5).advance(entry)
    assert repair.is_clean is stays
    if not stays:
        assert repair.request == Request(Op.REMOVE, "k", "c")


def test_a_repair_looks_four_times_and_then_deletes() -> None:
    repair = Repair("k", 5)
    for _ in range(REPAIR_ROUNDS):
        assert repair.request == Request(Op.READ, "k")
        repair = repair.advance(found(Kind.VALUE, 1)).advance(DIFFERS)
    assert repair.request == Request(Op.DELETE, "k")
    assert repair.advance(DONE).is_clean
    assert repair.advance(UNKNOWN).is_done
    assert not repair.advance(UNKNOWN).is_clean


@pytest.mark.parametrize("repair", [Repair("k", 5), Repair("k", 5).advance(found(Kind.LEASE))])
def test_a_repair_without_an_answer_deletes_without_looking(repair: Repair) -> None:
    assert repair.advance(UNKNOWN).request == Request(Op.DELETE, "k")


def test_a_marker_carries_the_value_it_replaces_only_over_that_value() -> None:
    writer = Writer.begin("k", 5, b"new", replaces=4)
    assert writer.request == Request(Op.READ, "k")
    over = writer.advance(found(Kind.VALUE, 4, b"old", "v"))
    assert over.request is not None
    assert (over.request.op, over.request.cas, over.request.kind) == (Op.STORE, "v", Kind.MARKER)
    shown = Reader("k").advance(found(Kind.MARKER, 5, over.request.payload))
    assert (shown.version, shown.payload, shown.source) == (4, b"old", Source.CACHE)
    assert Reader("k", floor=5).advance(found(Kind.MARKER, 5, over.request.payload)).marked == 1
    for other in (NOTHING, UNKNOWN, found(Kind.VALUE, 3), found(Kind.LEASE), found(Kind.MARKER, 4)):
        plain = writer.advance(other).request
        assert plain is not None
        assert (plain.op, plain.payload) == (Op.PUT, b"")
    again = over.advance(DIFFERS).request
    assert again is not None
    assert (again.op, again.cas, again.payload) == (Op.PUT, None, b"")


def test_a_reader_fills_on_its_lease_only() -> None:
    reader = Reader("k", lives=LIVES)
    assert reader.request == Request(Op.LEASE, "k", ttl=4.0)
    holder = reader.advance(Answer(Outcome.WON, "l"))
    assert holder.must_load
    assert holder.holds_lease
    filled = holder.loaded(7, b"row")
    assert filled.request == Request(Op.STORE, "k", "l", Kind.VALUE, 7, b"row", 60.0)
    for answer in (DONE, DIFFERS, UNKNOWN):
        assert filled.advance(answer).is_done
    absent = holder.loaded(0, None)
    assert absent.request == Request(Op.STORE, "k", "l", Kind.ABSENCE, 0, b"", 2.0)
    given_up = holder.not_loaded()
    assert given_up.request == Request(Op.REMOVE, "k", "l")
    assert given_up.advance(DONE).is_done
    without = reader.advance(UNKNOWN)
    assert without.must_load
    assert without.loaded(7, b"row").is_done
    assert without.not_loaded().is_done


def test_a_reader_waits_for_others_and_not_for_ever() -> None:
    reader = Reader("k", patience=Patience(markers=2, leases=3, first=0.001, longest=0.003))
    assert reader.pause == 0.0
    pauses = []
    for _ in range(3):
        reader = reader.advance(found(Kind.LEASE))
        pauses.append(reader.pause)
    assert pauses == [0.001, 0.002, 0.003]
    assert reader.advance(found(Kind.LEASE)).must_load
    for _ in range(2):
        reader = reader.advance(found(Kind.MARKER, 9))
    reader = reader.advance(found(Kind.MARKER, 9))
    assert reader.must_load
    assert not reader.holds_lease


def test_below_the_floor_is_a_miss_that_fills_nothing() -> None:
    for entry in (found(Kind.VALUE, 4), found(Kind.ABSENCE)):
        reader = Reader("k", floor=5).advance(entry)
        assert reader.must_load
        assert not reader.holds_lease
    assert Reader("k", floor=5).advance(found(Kind.VALUE, 5)).is_done


def test_garbage_is_removed() -> None:
    reader = Reader("k").advance(found(Kind.GARBAGE, cas="g"))
    assert reader.request == Request(Op.REMOVE, "k", "g")
    assert reader.advance(DONE).must_load
    undecodable = Reader("k").advance(found(Kind.VALUE, 5, b"?", "v")).rejected()
    assert undecodable.request == Request(Op.REMOVE, "k", "v")
    assert undecodable.advance(DIFFERS).must_load


def test_answers_that_nobody_asked_for_are_refused() -> None:
    with pytest.raises(ValueError, match="READY"):
        marked().advance(DONE)
    with pytest.raises(ValueError, match="LOAD"):
        Reader("k", phase=Phase.LOAD).advance(DONE)
