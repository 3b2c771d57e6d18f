"""The bytes of an id map: what goes in comes out, and what was changed is never believed."""

from __future__ import annotations

from array import array
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.errors import (
    ConfigurationError,
    DamagedMapError,
    InvalidMappingError,
    OverloadedError,
)
from shardkit.idmap import MAX_ID, MAX_VALUE, Layout
from shardkit.idmap.blocks import cell_of, decode, empty, encode
from shardkit.idmap.building import built, windows
from shardkit.idmap.layout import DENSE, HEAD, LIST, ROW, SPARSE, allocated, row_size
from shardkit.idmap.steps import Steps

NAMES = {DENSE: "dense", SPARSE: "sparse", LIST: "list"}


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Layout, int, array[int]]:
    """Blocks of every density, with values of every width."""
    layout = Layout(draw(st.integers(2, 8)))
    cells = empty(layout)
    draws = Random(draw(st.integers(0, 2**32)))
    largest = draw(st.sampled_from([0, 100, 2**16, 2**24 - 2, 2**40, MAX_VALUE]))
    share = draw(st.sampled_from([0.0, 0.001, 0.02, 0.08, 0.2, 0.5, 0.9, 1.0]))
    start = draw(st.integers(0, layout.n_slots - 1))
    for slot in range(start, layout.n_slots):
        if draws.random() < share:
            cells[slot] = draws.randint(0, largest) + 1
    return layout, draw(st.integers(0, MAX_ID // layout.n_slots)), cells


@settings(max_examples=30, deadline=None)
@given(blocks())
def test_cells_survive(made: tuple[Layout, int, array[int]]) -> None:
    layout, block, cells = made
    data = encode(layout, block, cells)
    assert decode(layout, block, data) == cells
    assert bool(data) == any(cells)


@settings(max_examples=30, deadline=None)
@given(blocks(), st.data())
def test_what_was_changed_is_not_believed(
    made: tuple[Layout, int, array[int]], data: st.DataObject
) -> None:
    layout, block, cells = made
    stored = encode(layout, block, cells)
    if not stored:
        return
    at = data.draw(st.integers(0, len(stored) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = stored[:at] + bytes([stored[at] ^ flip]) + stored[at + 1 :]
    for garbage in (changed, stored[:at], stored + b"\0", b"\0" * len(stored)):
        if garbage:
            with pytest.raises(DamagedMapError):
                decode(layout, block, garbage)
    with pytest.raises(DamagedMapError):
        decode(layout, block + 1, stored)


def test_a_row_is_of_its_place() -> None:
    """A row that lies where another belongs, or in another block, is found out."""
    layout = Layout()
    cells = array("Q", [7] * layout.n_slots)
    stored, head = encode(layout, 5, cells), layout.head(5, DENSE, 3)
    size = row_size(3)
    first, second = (stored[HEAD + n * size : HEAD + (n + 1) * size] for n in (0, 1))
    assert cell_of(layout, 5, head, 0, first) == 7
    assert cell_of(layout, 5, head, ROW, second) == 7
    for slot, row in ((0, second), (ROW, first)):
        with pytest.raises(DamagedMapError, match="block 5 of the map, ids 26560 to 31871"):
            cell_of(layout, 5, head, slot, row)
    with pytest.raises(DamagedMapError):
        cell_of(layout, 6, layout.head(6, DENSE, 3), 0, first)


@pytest.mark.parametrize("width", range(2, 9))
def test_a_dense_block_fills_a_class_of_the_allocator(width: int) -> None:
    layout = Layout(width)
    whole = encode(layout, 0, array("Q", [1] * layout.n_slots))
    assert allocated(len(whole)) == 16 * 1024
    assert allocated(len(whole) + row_size(width)) > 16 * 1024
    assert 16 * 1024 / layout.n_slots < width * 1.07


@pytest.mark.parametrize(
    ("size", "taken"),
    [(1, 16), (12, 16), (13, 32), (250, 256), (252, 256), (300, 320), (16_378, 16_384),
     (16_379, 20_480), (65_530, 65_536), (65_531, 81_920)],
)  # fmt: skip
def test_sizes_are_those_of_jemalloc(size: int, taken: int) -> None:
    assert allocated(size) == taken


def test_the_encoding_is_the_one_that_costs_least() -> None:
    layout = Layout()
    found = {}
    for share in (1, 2, 4, 10, 40):
        cells = array("Q", [5 if n % share == 0 else 0 for n in range(layout.n_slots)])
        data = encode(layout, 0, cells)
        found[share] = NAMES[layout.read_head(0, data)[0]]
        entries = len(cells) - cells.count(0)
        assert allocated(len(data)) / entries < 3 + 1.2 * min(share, 3)
    assert found == {1: "dense", 2: "sparse", 4: "sparse", 10: "sparse", 40: "list"}


@pytest.mark.parametrize("wrong", [-1, 2**63, True, 1.0, "1", None, b"1"])
def test_ids_and_values_are_ints_of_63_bits(wrong: Any) -> None:
    layout = Layout()
    for check in (layout.place, layout.cell):
        with pytest.raises(InvalidMappingError, match=r"give an int from 0 to 2\^63 - 1"):
            check(wrong)
    for entry in ((wrong, 1), (1, wrong)):
        if wrong is not True:  # what packs millions takes 1 by any name
            with pytest.raises(InvalidMappingError):
                list(built(layout, [(0, 1), entry]))
    assert layout.place(MAX_ID) == divmod(MAX_ID, layout.n_slots)
    assert layout.cell(MAX_VALUE) == 2**63


@pytest.mark.parametrize("width", [0, 1, 9, 3.0, True, "3", None])
def test_a_width_is_2_to_8(width: Any) -> None:
    with pytest.raises(ConfigurationError, match="2 to 8 bytes"):
        Layout(width)


@pytest.mark.parametrize("name", ["", "a b", "{a}", "a:b", "é", "a" * 65, "a\n"])
def test_a_name_is_plain(name: str) -> None:
    with pytest.raises(ConfigurationError, match="letters, digits"):
        Steps(name, Layout())


def test_a_block_that_comes_twice_begins_the_next_window() -> None:
    layout = Layout()
    far = layout.n_slots * 3
    found = [
        ([block for block, _ in made], more.entries, more.last_id)
        for made, more in windows(layout, [(0, 1), (far, 2), (1, 3), (far + 1, 4)])
    ]
    assert found == [([0, 3], 2, far), ([0, 3], 2, far + 1)]


def test_a_window_is_bounded() -> None:
    layout = Layout(8)
    entries = ((n * layout.n_slots, n) for n in range(1000))
    made = [len(each) for each, _ in windows(layout, entries)]
    assert sum(made) == 1000
    assert max(made) == 32


def test_who_is_always_too_late_is_told() -> None:
    """Others change the block between every read and every swap."""
    work = Steps("m", Layout()).change({1: 1})
    trips = 0

    def carry_out() -> None:
        nonlocal trips
        commands = next(work)
        while True:
            trips += 1
            commands = work.send([None if command[0] == "GET" else 0 for command in commands])

    with pytest.raises(OverloadedError, match="block 0 of the map 'm' 64 times") as late:
        carry_out()
    assert trips == 128
    assert late.value.retryable
