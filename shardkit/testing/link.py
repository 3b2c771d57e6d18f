"""One connection of a client through a fault proxy, and its own connection to the server.

Made by `shardkit.testing.proxy`, in whose event loop it lives. Bytes are read and delayed in one
task per direction and written in another, so that what is under way does not hold up what is
said, and queues are bounded.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Protocol

from shardkit.testing.faults import CHUNK, Fault, Shape, Trigger, Way, When
from shardkit.testing.wire import Answer, Conversation, Message

__all__ = ["Link", "Road"]

_QUEUED = 64
"""Pieces under way in one direction before the sender has to wait: 4 MiB at most."""


class Road(Protocol):
    """What a link asks of its proxy."""

    @property
    def server(self) -> tuple[str, int]:
        """Address of the server."""

    @property
    def shapes(self) -> Mapping[Way, Shape]:
        """How each direction delays."""

    @property
    def black(self) -> Collection[Way]:
        """Directions in which everything is lost."""

    @property
    def flowing(self) -> Mapping[Way, asyncio.Event]:
        """Directions; set while they are not stalled."""

    def count(self, **more: int) -> None:
        """Add to the counts."""

    def note(self, message: Message) -> None:
        """Count a message."""

    def delay(self, way: Way) -> float:
        """Return how many seconds a piece is to be under way."""

    def watching(self, message: Message) -> Trigger | None:
        """Return the trigger that a message sets off, if any."""


class Link:
    """One connection of a client, and its own to the server, opened with the first byte."""

    def __init__(
        self,
        road: Road,
        conversation: Conversation,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.black: set[Way] = set()
        self.has_lost = False
        self.errors: list[BaseException] = []
        self._road = road
        self._conversation = conversation
        self._loop = asyncio.get_running_loop()
        self._client = (reader, writer)
        self._server: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        self._server = self._loop.create_future()
        self._queues: dict[Way, asyncio.Queue[tuple[float, bytes]]]
        self._queues = {way: asyncio.Queue(_QUEUED) for way in Way}
        self._last_due = dict.fromkeys(Way, 0.0)
        self._after: list[tuple[int, Trigger]] = []
        self._is_asked = False
        self._is_over = False
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Carry bytes until both directions have ended or the connection is broken."""
        work = (
            self._hear_client(),
            self._write_server(),
            self._hear_server(),
            self._write_client(),
        )
        self._tasks = [asyncio.create_task(part) for part in work]
        if self._is_over:  # broken before it began
            self.suffer(Fault.RESET)
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        for _, writer in self._sides():
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        self._server.cancel()
        self.errors += [
            o
            for o in outcomes
            if o is not None and not isinstance(o, OSError | asyncio.CancelledError)
        ]

    def suffer(self, fault: Fault) -> None:
        """Break the connection."""
        if fault is Fault.RESET:
            for _, writer in self._sides():
                end = struct.pack("ii", 1, 0)  # socket(7): lingering for no time is a reset
                with suppress(OSError):
                    writer.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, end
                    )
                writer.transport.abort()
        if fault in {Fault.RESET, Fault.CLOSE}:
            self._is_over = True
            for task in self._tasks:
                task.cancel()
        if fault in {Fault.HALF_OPEN, Fault.BLACK_HOLE}:
            self.black.update(Way)
            self.has_lost = True
        if fault is Fault.HALF_OPEN and self._server.done():
            self._server.result()[1].close()

    def _sides(self) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        is_connected = self._server.done() and not self._server.cancelled()
        return [self._client, *([self._server.result()] if is_connected else [])]

    async def _hear_client(self) -> None:
        try:
            while data := await self._client[0].read(CHUNK):
                self._road.count(bytes_to_server=len(data))
                for message in self._conversation.from_client(data):
                    self._road.note(message)
                    self._is_asked = message.kind not in {"X", "cancel"}
                    trigger = self._road.watching(message)
                    if trigger is not None and trigger.when is When.AFTER:
                        self._after.append((message.answer, trigger))
                    elif trigger is not None:
                        await trigger.act(self)
                    await self._send(Way.TO_SERVER, message.raw)
            await self._send(Way.TO_SERVER, b"")
        except OSError:
            self.suffer(Fault.RESET)

    async def _hear_server(self) -> None:
        reader, _ = await asyncio.shield(self._server)
        held: list[Answer] = []
        try:
            while data := await reader.read(CHUNK):
                turns = self._is_asked and self._conversation.is_open
                self._is_asked = False
                self._road.count(bytes_to_client=len(data), round_trips=turns)
                for answer in self._conversation.from_server(data):
                    held.append(answer)
                    if self._after and self._after[0][0] <= answer.number:
                        if not answer.is_end:
                            continue
                        await self._after.pop(0)[1].act(self)
                    for piece in held:
                        await self._send(Way.TO_CLIENT, piece.raw)
                    held.clear()
            await self._send(Way.TO_CLIENT, b"")
        except OSError:
            self.suffer(Fault.RESET)

    async def _send(self, way: Way, raw: bytes) -> None:
        """Put bytes under way; none is the end of the stream."""
        if way in self.black or way in self._road.black:
            self.has_lost = True
            return
        due = max(self._last_due[way], self._loop.time() + self._road.delay(way))
        self._last_due[way] = due
        await self._queues[way].put((due, raw))

    async def _write_server(self) -> None:
        raw = await self._arrived(Way.TO_SERVER)
        try:
            if raw:
                self._server.set_result(await asyncio.open_connection(*self._road.server))
        except OSError:  # the server is not there
            raw = b""
        if not raw:
            self.suffer(Fault.RESET)
            return
        await self._write(Way.TO_SERVER, self._server.result()[1], raw)

    async def _write_client(self) -> None:
        raw = await self._arrived(Way.TO_CLIENT)
        await self._write(Way.TO_CLIENT, self._client[1], raw)

    async def _arrived(self, way: Way) -> bytes:
        """Return the next bytes once they are due and the way is free."""
        due, raw = await self._queues[way].get()
        await asyncio.sleep(due - self._loop.time())
        await self._road.flowing[way].wait()
        return raw

    async def _write(self, way: Way, writer: asyncio.StreamWriter, raw: bytes) -> None:
        try:
            while raw:
                shape = self._road.shapes[way]
                for at in range(0, len(raw), shape.largest):
                    piece = raw[at : at + shape.largest]
                    await self._road.flowing[way].wait()
                    writer.write(piece)
                    await writer.drain()
                    if shape.bandwidth is not None:
                        await asyncio.sleep(len(piece) / shape.bandwidth)
                raw = await self._arrived(way)
            writer.write_eof()
        except OSError:
            self.suffer(Fault.RESET)
