"""What a map asks the server, and what it makes of the answers: for threads and asyncio. No I/O.

Each call is a generator: it yields the commands of one round trip, is sent their replies, and
returns the result. So every decision is made once, and tested without a server.

A read asks a dense block for one row with GETRANGE, and all others with a script; which of them
is dense, and how wide, is remembered in 64 KiB of hints. A hint is never believed: rows carry a
check of where they belong, and one that does not fit is asked for again by script.

A write reads, decides and swaps: what was read is compared on the server, in the same step that
replaces it. So a write holds no lock, and one that comes too late looks again.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, TypeVar

from shardkit.errors import (
    ConfigurationError,
    DamagedMapError,
    IdMapMismatchError,
    OverloadedError,
)
from shardkit.idmap.blocks import cell_of, decode, encode, row_cells, row_of
from shardkit.idmap.layout import DENSE, HEAD, LIST, ROW, Layout, row_size, width_of
from shardkit.idmap.replies import bytes_of, wrong
from shardkit.idmap.scripts import READ, SWAP, SWAP_ROWS, Command, call

__all__ = ["Steps", "Work"]

_Result = TypeVar("_Result")
Work = Generator[list[Command], list[Any], _Result]
"""One call: yields commands, is sent replies, returns the result."""

_HINTS: Final = 1 << 16
_ROWS_AT_ONCE: Final = 4096
"""Rows that one round trip asks for at most: under a mebibyte at three bytes a value."""
_BLOCKS_AT_ONCE: Final = 64
_ATTEMPTS: Final = 64
_ROWS_IN_PLACE: Final = 8
"""Rows of a dense block that are changed in place; for more it is replaced."""
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")

Changes = dict[int, int]
"""Cells by slot; zero removes an entry."""


@dataclass
class _Change:
    """What one block becomes, and how far that is."""

    block: int
    cells: Changes
    is_whole: bool
    before: Changes = field(default_factory=dict)

    def rows(self) -> list[int]:
        return sorted({slot // ROW for slot in self.cells})


class Steps:
    """The calls of one map.

    Args:
        name: of the map: letters, digits, `_`, `.` and `-`, at most 64.
        layout: how ids are laid out.

    Raises:
        ConfigurationError: the name cannot be one.
    """

    def __init__(self, name: str, layout: Layout) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"{name!r} is no name of an id map",
                hint="use letters, digits, _, . and -; at most 64 of them",
            )
        self.name = name
        self.layout = layout
        self.prefix = f"shardkit:idmap:{name}:".encode()
        self._meta_key = self.prefix + b"meta"
        self._meta = f"1 {layout.width}".encode()
        self._is_known = False
        self._hints = bytearray(_HINTS)

    def key(self, block: int) -> bytes:
        """Return the name of a block's key; no braces, so that a cluster spreads the blocks."""
        return self.prefix + b"%d" % block

    # The layout of the map

    def known(self) -> Work[None]:
        """Learn what the map is."""
        replies = yield [("GET", self._meta_key)]
        self._compare(bytes_of(replies[0], self._meta_key))

    def reading(self, work: Work[_Result]) -> Work[_Result]:
        """Return the same work, which learns in its first round trip what the map is."""
        if self._is_known:
            return work
        return self._learning(work)

    def _learning(self, work: Work[_Result]) -> Work[_Result]:
        try:
            replies = yield [("GET", self._meta_key), *next(work)]
            self._compare(bytes_of(replies[0], self._meta_key))
            while True:
                replies = yield work.send(replies[1:])
                replies = [None, *replies]
        except StopIteration as end:
            result: _Result = end.value
            return result

    def writing(self, work: Work[_Result]) -> Work[_Result]:
        """Return the same work, done after it is known what the map is; a new one is begun."""
        if not self._is_known:
            commands: list[Command] = [
                ("SET", self._meta_key, self._meta, b"NX"),
                ("GET", self._meta_key),
            ]
            made, held = yield commands
            if isinstance(made, Exception):
                raise wrong(made, self._meta_key)
            self._compare(bytes_of(held, self._meta_key))
        return (yield from work)

    def _compare(self, held: bytes) -> None:
        if held and held != self._meta:
            words = held.split()
            if len(words) == 2 and words[0] == b"1" and words[1].isdigit():
                raise IdMapMismatchError(
                    f"the map {self.name!r} was made for values of {int(words[1])} bytes, "
                    f"and is used with width={self.layout.width}",
                    hint=f"open it with width={int(words[1])}, or load another under a new name",
                )
            raise IdMapMismatchError(
                f"the map {self.name!r} has a format that this version does not know: "
                f"{held[:40]!r} under {self._meta_key.decode()}",
                hint="use the version that wrote it, or load another under a new name",
            )
        self._is_known = bool(held)

    # Reads

    def get(self, id: int) -> Work[int | None]:  # noqa: A002  the glossary's word
        """Return the value of one id."""
        block, slot = self.layout.place(id)
        width = self._hints[block % _HINTS]
        if width:
            row, size = slot // ROW, row_size(width)
            at = HEAD + row * size
            command = ("GETRANGE", self.key(block), at, at + size - 1)
            cell = self._hinted(block, width, slot, (yield [command])[0])
            if cell is not None:
                return cell - 1 if cell else None
        replies = yield [self._asked(block, (slot // ROW,))]
        cell = self._scripted(block, (slot // ROW,), (slot,), replies[0])[slot]
        return cell - 1 if cell else None

    def get_many(self, ids: Iterable[int]) -> Work[dict[int, int]]:
        """Return the values of those ids that have one, in the order asked for."""
        places = {key: self.layout.place(key) for key in ids}
        slots: dict[tuple[int, int], list[int]] = {}
        for block, slot in places.values():
            slots.setdefault((block, slot // ROW), []).append(slot)
        cells: dict[tuple[int, int], int] = {}
        rows = iter(sorted(slots))
        while asked := list(islice(rows, _ROWS_AT_ONCE)):
            yield from self._rows(asked, slots, cells)
        return {key: cells[place] - 1 for key, place in places.items() if cells[place]}

    def _rows(
        self,
        asked: Sequence[tuple[int, int]],
        slots: Mapping[tuple[int, int], Sequence[int]],
        cells: dict[tuple[int, int], int],
    ) -> Work[None]:
        """Put the cells of some rows among the others."""
        hinted: list[tuple[int, int, int]] = []
        scripted: dict[int, list[int]] = {}
        commands: list[Command] = []
        for block, row in asked:
            if width := self._hints[block % _HINTS]:
                size = row_size(width)
                at = HEAD + row * size
                commands.append(("GETRANGE", self.key(block), at, at + size - 1))
                hinted.append((block, row, width))
            else:
                scripted.setdefault(block, []).append(row)
        commands += [self._asked(block, rows) for block, rows in scripted.items()]
        replies = yield commands
        again: dict[int, list[int]] = {}
        for (block, row, width), reply in zip(hinted, replies, strict=False):
            for slot in slots[block, row]:
                cell = self._hinted(block, width, slot, reply)
                if cell is None:
                    again.setdefault(block, []).append(row)
                    break
                cells[block, slot] = cell
        answers = [*zip(scripted.items(), replies[len(hinted) :], strict=True)]
        if again:
            more = yield [self._asked(block, rows) for block, rows in again.items()]
            answers += zip(again.items(), more, strict=True)
        for (block, rows), reply in answers:
            wanted = [slot for row in rows for slot in slots[block, row]]
            for slot, cell in self._scripted(block, rows, wanted, reply).items():
                cells[block, slot] = cell

    def _asked(self, block: int, rows: Iterable[int]) -> Command:
        return call(READ, self.key(block), self.layout.n_rows, *rows)

    def _hinted(self, block: int, width: int, slot: int, reply: Any) -> int | None:
        """Return the cell in a row, or None when the block is not what the hint says."""
        data = bytes_of(reply, self.key(block))
        try:
            return cell_of(self.layout, block, self.layout.head(block, DENSE, width), slot, data)
        except DamagedMapError:  # or only changed meanwhile: the script tells
            self._hints[block % _HINTS] = 0
            return None

    def _scripted(
        self, block: int, rows: Sequence[int], slots: Sequence[int], reply: Any
    ) -> dict[int, int]:
        """Return cells by slot, of what the script found; all zero where there is no block."""
        found = self._found(block, reply)
        head, parts = found[0], found[1:]
        if not head:
            return dict.fromkeys(slots, 0)
        encoding, _ = self.layout.read_head(block, head)
        if len(parts) != (1 if encoding == LIST else len(rows)):
            raise self.layout.damage(block, "it is cut off")
        data = dict(zip(rows, parts * len(rows) if encoding == LIST else parts, strict=True))
        cells = {slot: cell_of(self.layout, block, head, slot, data[slot // ROW]) for slot in slots}
        self._learn(block, head)
        return cells

    def _found(self, block: int, reply: Any) -> list[bytes]:
        if isinstance(reply, Exception):
            raise wrong(reply, self.key(block))
        return [bytes_of(each, self.key(block)) for each in reply]

    def _learn(self, block: int, data: bytes) -> None:
        encoding, width = self.layout.read_head(block, data) if data else (LIST, 0)
        self._hints[block % _HINTS] = width if encoding == DENSE else 0

    # Writes

    def change(self, changes: Mapping[int, int | None]) -> Work[dict[int, int]]:
        """Set values, and remove where there is None; return what those ids had before.

        All of one block at once; several blocks one after the other.
        """
        blocks: dict[int, Changes] = {}
        for id, value in changes.items():  # noqa: A001  the glossary's word
            block, slot = self.layout.place(id)
            cell = 0 if value is None else self.layout.cell(value)
            blocks.setdefault(block, {})[slot] = cell
        before: dict[int, int] = {}
        waiting = iter(sorted(blocks))
        while numbers := list(islice(waiting, _BLOCKS_AT_ONCE)):
            work = [_Change(n, blocks[n], not self._hints[n % _HINTS]) for n in numbers]
            yield from self._carried(work)
            for each in work:
                first = each.block * self.layout.n_slots
                before |= {first + slot: cell - 1 for slot, cell in each.before.items() if cell}
        return before

    def put(self, blocks: Sequence[tuple[int, array[int]]]) -> Work[int]:
        """Store blocks that are new, and add those to the others that are there already.

        Returns:
            The bytes of those that are new.
        """
        made = [(block, encode(self.layout, block, cells)) for block, cells in blocks]
        replies = yield [call(SWAP, self.key(block), b"", data) for block, data in made]
        again = []
        size = 0
        for (block, cells), (_, data), reply in zip(blocks, made, replies, strict=True):
            if self._is_done(block, reply):
                self._learn(block, data)
                size += len(data)
            else:
                slots = {slot: cell for slot, cell in enumerate(cells) if cell}
                again.append(_Change(block, slots, is_whole=True))
        yield from self._carried(again)
        return size

    def _carried(self, work: Sequence[_Change]) -> Work[None]:
        """Read, decide and swap, until all are done."""
        pending = list(work)
        for _ in range(_ATTEMPTS):
            if not pending:
                return
            replies = yield [
                ("GET", self.key(each.block))
                if each.is_whole
                else self._asked(each.block, each.rows())
                for each in pending
            ]
            swaps: list[tuple[_Change, Command]] = []
            later: list[_Change] = []
            for each, reply in zip(pending, replies, strict=True):
                command = self._whole(each, reply) if each.is_whole else self._in_place(each, reply)
                if command is not None:
                    swaps.append((each, command))
                elif not each.before and each.cells:  # it has to be read whole
                    each.is_whole = True
                    later.append(each)
            if swaps:
                replies = yield [command for _, command in swaps]
                for (each, _), reply in zip(swaps, replies, strict=True):
                    if not self._is_done(each.block, reply):
                        later.append(each)
            pending = later
        raise OverloadedError(
            f"others changed block {pending[0].block} of the map {self.name!r} "
            f"{_ATTEMPTS} times before this could",
            hint="set the same again: what has been set already stays as it is",
        )

    def _is_done(self, block: int, reply: Any) -> bool:
        if isinstance(reply, Exception):
            raise wrong(reply, self.key(block), is_change=True)
        return bool(reply)

    def _whole(self, change: _Change, reply: Any) -> Command | None:
        """Return the command that replaces a block; None when it is as it should be."""
        layout, block = self.layout, change.block
        data = bytes_of(reply, self.key(block))
        cells = decode(layout, block, data)
        change.before = {slot: cells[slot] for slot in change.cells}
        for slot, cell in change.cells.items():
            cells[slot] = cell
        if change.before == change.cells:
            self._learn(block, data)
            return None
        after = encode(layout, block, cells)
        self._learn(block, after)
        return call(SWAP, self.key(block), data, after)

    def _in_place(self, change: _Change, reply: Any) -> Command | None:
        """Return the command that changes rows of a dense block.

        None with `before` set when they are as they should be; without it when the block has to
        be read whole: it is not dense, gets a wider value, or loses the last entry of a row.
        """
        layout, block, rows = self.layout, change.block, change.rows()
        change.before = {}
        found = self._found(block, reply)
        head = found[0]
        self._learn(block, head)
        width = self._hints[block % _HINTS]
        largest = max(change.cells.values())
        if not width or width_of(largest) > width or len(rows) > _ROWS_IN_PLACE:
            return None
        if len(found) != len(rows) + 1:
            raise layout.damage(block, "it is cut off")
        before: Changes = {}
        parts: list[bytes | int] = []
        for row, data in zip(rows, found[1:], strict=True):
            cells = row_cells(layout, block, head, row, data)
            for slot, cell in change.cells.items():
                if slot // ROW == row:
                    before[slot] = cells[slot % ROW]
                    cells[slot % ROW] = cell
            if not any(cells):
                return None
            parts += (HEAD + row * row_size(width), data, row_of(layout, block, head, row, cells))
        change.before = before
        if before == change.cells:
            return None
        return call(SWAP_ROWS, self.key(block), *parts)
