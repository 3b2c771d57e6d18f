"""What a whole map holds, block by block, and whether it is what was written. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shardkit.errors import DamagedMapError
from shardkit.idmap.blocks import decode
from shardkit.idmap.layout import DENSE, LIST, SPARSE, allocated
from shardkit.idmap.replies import bytes_of
from shardkit.idmap.scripts import Command
from shardkit.idmap.steps import Steps, Work

__all__ = ["Found", "Scan"]

_NAMES: Final = {DENSE: "dense", SPARSE: "sparse", LIST: "list"}
_KEEPS: Final = ("noeviction", "volatile-")
"""Policies under which Redis throws none of the blocks away, which never expire."""


@dataclass
class Found:
    """What a map holds.

    Attributes:
        entries: ids that have a value.
        blocks: how many blocks there are, by encoding.
        allocated_bytes: what their strings take in the server, as jemalloc rounds it.
        widest: bytes of the widest value.
        damaged: key of each block that is not what was written, and what is wrong with it.
        may_evict: whether the server throws blocks away when memory is short (`maxmemory-policy`):
            their ids would seem to have no value.
    """

    entries: int = 0
    blocks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_NAMES.values(), 0))
    allocated_bytes: int = 0
    widest: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    may_evict: bool = False


class Scan:
    """Reads every block of a map.

    Args:
        steps: of the map.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.found = Found()
        self.pattern = steps.prefix + b"*"

    def policies(self, infos: Iterable[Any]) -> None:
        """Take in what servers say of their memory."""
        said = [str(info.get("maxmemory_policy", "noeviction")) for info in infos]
        self.found.may_evict = any(not each.startswith(_KEEPS) for each in said)

    def batches(self, keys: Iterable[bytes]) -> Iterator[Work[None]]:
        """Return the work of each round trip, for keys as they are found."""
        batch: list[bytes] = []
        for key in keys:
            if key != self._steps.prefix + b"meta":
                batch.append(key)
            if len(batch) == 32:
                yield self._batch(batch)
                batch = []
        if batch:
            yield self._batch(batch)

    def _batch(self, keys: Sequence[bytes]) -> Work[None]:
        commands: list[Command] = [("GET", key) for key in keys]
        for key, reply in zip(keys, (yield commands), strict=True):
            try:
                self._count(key, bytes_of(reply, key))
            except DamagedMapError as error:
                self.found.damaged[key.decode(errors="replace")] = error.message

    def _count(self, key: bytes, data: bytes) -> None:
        number = key.removeprefix(self._steps.prefix)
        if not number.isdigit() or number != b"%d" % int(number):
            raise DamagedMapError("its name is none of a block")
        if not data:  # deleted since it was found
            return
        layout, block = self._steps.layout, int(number)
        cells = decode(layout, block, data)
        encoding, width = layout.read_head(block, data)
        self.found.entries += len(cells) - cells.count(0)
        self.found.blocks[_NAMES[encoding]] += 1
        self.found.allocated_bytes += allocated(len(data))
        self.found.widest = max(self.found.widest, width)
