"""The lookup protocol keeps its promises in every interleaving, with a crash after every step."""

from __future__ import annotations

import pytest

from shardkit.reserving import Pair
from tests.property.interleavings import (
    Change,
    Faults,
    Save,
    State,
    Step,
    Undo,
    backfill,
    complete,
    explore,
    sweep,
    work,
)

A, B, C = "a", "b", "c"

# What is stored at first, then what runs at the same time.
SCENES: dict[str, tuple[dict[int, str], list[list[Step]]]] = {
    "two take one value": (
        {},
        [[(Change(1, A, is_new=True),)], [(Change(2, A, is_new=True),)]],
    ),
    "three take one value": (
        {},
        [[(Change(n, A, is_new=True),)] for n in (1, 2, 3)],
    ),
    "one gives up what another takes": (
        {1: A},
        [[(Change(1, B),)], [(Change(2, A, is_new=True),)]],
    ),
    "one gives up and takes back what another takes": (
        {1: A},
        [[(Change(1, B),)], [(Change(1, A),)], [(Change(2, A, is_new=True),)]],
    ),
    "one deletes what another takes": (
        {1: A},
        [[(Change(1, None),)], [(Change(2, A, is_new=True),)]],
    ),
    "a swap, and one who wants a value of it": (
        {1: A, 2: B},
        [[(Change(1, B), Change(2, A))], [(Change(3, A, is_new=True),)]],
    ),
    "two swaps": (
        {1: A, 2: B},
        [[(Change(1, B), Change(2, A))], [(Change(1, B), Change(2, A))]],
    ),
    "a swap in two transactions": (
        {1: A, 2: B},
        [[(Change(1, B),)], [(Change(2, A),)]],
    ),
    "deleted and made again": (
        {1: A},
        [[(Change(1, None), Change(2, A, is_new=True))], [(Change(3, A, is_new=True),)]],
    ),
    "the same new row twice": (
        {},
        [
            [(Change(1, A, is_new=True),)],
            [(Change(1, A, is_new=True),)],
            [(Change(2, A, is_new=True),)],
        ],
    ),
    "inserted, then updated": (
        {},
        [
            [(Change(1, A, is_new=True),), (Change(1, B),)],
            [(Change(2, A, is_new=True),)],
        ],
    ),
    "taken by turns in one transaction": (
        {1: A},
        [
            [(Change(1, B),), (Change(2, A, is_new=True),), (Change(2, C),), (Change(1, A),)],
            [(Change(3, A, is_new=True),)],
        ],
    ),
    "a savepoint that is undone": (
        {},
        [
            [Save(), (Change(1, A, is_new=True),), Undo(), (Change(2, A, is_new=True),)],
            [(Change(3, A, is_new=True),)],
        ],
    ),
    "a savepoint that gave its value away": (
        {},
        [
            [
                (Change(1, A, is_new=True),),
                Save(),
                (Change(1, B),),
                (Change(2, A, is_new=True),),
                Undo(),
            ],
            [(Change(3, A, is_new=True),)],
        ],
    ),
    "a savepoint after another, with the value there and back": (
        {},
        [
            [
                (Change(1, A, is_new=True),),
                Save(),
                Undo(),
                Save(),
                (Change(1, B),),
                (Change(1, A),),
                Undo(),
            ],
            [(Change(3, A, is_new=True),)],
        ],
    ),
    "a savepoint, undone, with the same value again": (
        {},
        [
            [
                Save(),
                (Change(1, A, is_new=True),),
                Undo(),
                (Change(1, A, is_new=True),),
            ],
            [(Change(3, A, is_new=True),)],
        ],
    ),
    "a rename to what is there already": (
        {1: A},
        [[(Change(1, B),)], [(Change(1, A),)]],
    ),
    "a rename beside one who believes that nothing changes": (
        {1: A, 2: B},
        [[(Change(2, C),), (Change(1, B),)], [(Change(2, B),)]],
    ),
}


def tickets(unit: int) -> list[int]:
    return [100 * (unit + 1) + n for n in range(4)]


@pytest.mark.parametrize("name", SCENES)
def test_a_value_has_one_row_and_no_row_lacks_its_pair(name: str) -> None:
    rows, scripts = SCENES[name]
    crashes = 2 if len(scripts) < 3 else 1
    units = [work(steps, tickets(i)) for i, steps in enumerate(scripts)]
    found = explore(rows, units, crashes=crashes)
    assert found.n_states > 100
    for end in found.ends:
        nothing_is_lost_for_ever(end)


def nothing_is_lost_for_ever(end: State) -> None:
    """Whoever comes later gets every value that no row has, and no other."""
    held = {value for _, value in end.rows}
    for value in (A, B, C):
        later = explore(
            {i: v for i, v in end.rows if v is not None},
            [work([(Change(9, value, is_new=True),)], [900])],
            crashes=0,
            lookups=dict(end.lookups),
        )
        (after,) = later.ends
        assert (dict(after.rows).get(9) == value) == (value not in held), end


def test_backfill_and_repair_beside_those_who_write() -> None:
    """Rows 1 and 2 are of a time without lookups; row 2 is renamed while it is read."""
    units = [
        backfill(1, A, 301),
        backfill(2, B, 302),
        work([(Change(2, C),)], tickets(0)),
        sweep(B),
    ]
    found = explore({1: A, 2: B}, units, lookups={C: (Pair(7, 7),)}, check=lambda _: None)
    finished = [end for end in found.ends if _has_pair(end, 1) and _has_pair(end, 2)]
    assert finished
    alive = explore(
        {1: A, 2: B}, units, crashes=0, lookups={C: (Pair(7, 7),)}, check=lambda _: None
    )
    for end in alive.ends:
        complete(end)


def test_two_of_one_value_that_a_backfill_meets_are_both_kept() -> None:
    units = [backfill(1, A, 301), backfill(2, A, 302), sweep(A)]
    for end in explore({1: A, 2: A}, units, crashes=0, lookups={B: ()}, check=lambda _: None).ends:
        complete(end)


def _has_pair(state: State, id_: int) -> bool:
    value = dict(state.rows)[id_]
    return value is not None and any(p.id == id_ for p in dict(state.lookups).get(value, ()))


@pytest.mark.parametrize(
    ("faults", "name"),
    [
        (Faults(no_wait=True), "two take one value"),
        (Faults(swap_blindly=True), "one gives up and takes back what another takes"),
        (Faults(swap_by_id=True), "one gives up and takes back what another takes"),
        (Faults(no_row_lock=True), "a rename beside one who believes that nothing changes"),
    ],
)
def test_the_search_notices_a_broken_step(faults: Faults, name: str) -> None:
    rows, scripts = SCENES[name]
    units = [work(steps, tickets(i)) for i, steps in enumerate(scripts)]
    with pytest.raises(AssertionError, match=r"two rows with one value|lacks its pair"):
        explore(rows, units, faults=faults)
