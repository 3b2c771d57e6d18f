"""Connections to Redis, redis-py's own, for threads and for asyncio: a batch of requests at a time.

A Redis may come back with the data of an earlier moment, from its file or from a replica. So the
data say under which `run_id` they were written, and a connection that finds those of another one
is refused: the server has to be flushed first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from redis import asyncio as async_redis
from redis import exceptions
from redis.asyncio import connection as async_connection
from redis.backoff import NoBackoff
from redis.connection import Connection
from redis.connection import parse_url as _parse_url
from redis.retry import Retry

from shardkit.caches.node import Node
from shardkit.caches.nodes import Nodes
from shardkit.caches.scripts import Prepared, answer_to, prepare, with_source
from shardkit.caches.served import Deadline
from shardkit.caching.operations import UNKNOWN, Answer, Op, Outcome, Request

parse_url: Final[Callable[[str], dict[str, Any]]] = _parse_url

__all__ = ["Asking", "AsyncRedisConnection", "Keeper", "Redirect", "RedisConnection", "run_id_of"]


class Asking(Request):
    """A request to a server that takes over its key's slot, but does not own it yet."""

    __slots__ = ()


class Redirect(NamedTuple):
    """What a server of a cluster answers that does not have a key; in place of a state's name.

    Attributes:
        slot: of the key.
        address: `host:port` of the server that has it.
        is_asked: whether this time only: the slot is on its way.
    """

    slot: int
    address: str
    is_asked: bool


class Keeper(NamedTuple):
    """What connections have to know of their cache.

    Attributes:
        nodes: told of a server that came back with old data.
        prefix: before every key.
        address: of a server, as a URL.
        life_key: name of the entry that says of which life a server's data are; None for a
            server that has no data.
    """

    nodes: Nodes
    prefix: str
    address: Callable[[Node], str]
    life_key: Callable[[Node], bytes | None]

    def made(self, node: Node, default: Any, retry: Any) -> Any:
        """Return redis-py's connection, not connected yet."""
        settings = parse_url(self.address(node))
        kind = settings.pop("connection_class", default)
        if default is async_connection.Connection and kind is not default:
            kind = getattr(async_connection, kind.__name__)
        return kind(**settings, retry=retry, protocol=2, health_check_interval=0)

    def asks(self, node: Node) -> list[tuple[Any, ...]]:
        """Return what a new connection asks: which life this is, and of which life the data are."""
        key = self.life_key(node)
        return [(b"INFO", b"server"), *([] if key is None else [(b"GET", key)])]

    def says(self, node: Node, replies: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return what it writes then; refuse a server whose data are of another life.

        The data say themselves: processes that begin after the restart have to know, too.

        Raises:
            ConnectionError: this is no Redis, or has to be flushed.
        """
        life, of_data = run_id_of(replies[0]), replies[1] if len(replies) > 1 else None
        if life is None or (
            isinstance(of_data, Exception) and not isinstance(of_data, exceptions.AskError)
        ):
            raise ConnectionError("this is no Redis")
        if type(of_data) is bytes and of_data != life:
            self.nodes.came_back(node)
        if node.must_flush and not node.is_gutter:
            raise ConnectionError("the server holds the data of an earlier moment")
        node.met(life)
        key = self.life_key(node)
        return [] if key is None or of_data == life else [(b"SET", key, life)]


def run_id_of(info: Any) -> bytes | None:
    """Return the `run_id` line of what a server says of itself."""
    lines = info.splitlines() if isinstance(info, bytes) else []
    return next((line for line in lines if line.startswith(b"run_id:")), None)


class _Wire:
    """What both kinds of connection know: how requests are sent and replies understood."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._prepared: list[Prepared] = []
        self._asking: list[bool] = []  # of what is sent

    def commands(self, requests: Sequence[Request]) -> list[tuple[Any, ...]]:
        self._prepared = [prepare(request, self._prefix) for request in requests]
        commands = [command for command, _ in self._prepared if command is not None]
        self._asking = []
        if any(type(request) is Asking for request in requests):
            both = zip(requests, self._prepared, strict=True)
            self._asking = [type(r) is Asking for r, (command, _) in both if command is not None]
            return self._asked(commands, self._asking)
        return commands

    @staticmethod
    def _asked(
        commands: Sequence[tuple[Any, ...]], asking: Sequence[bool]
    ) -> list[tuple[Any, ...]]:
        pairs = zip(commands, asking, strict=True)
        return [each for c, asks in pairs for each in (((b"ASKING",), c) if asks else (c,))]

    def replies(self, replies: list[Any]) -> list[Any]:
        """Return the replies to the commands themselves."""
        if not any(self._asking):
            return replies
        rest = iter(replies)
        own: list[Any] = []
        for asks in self._asking:
            if asks:
                next(rest)
            own.append(next(rest))
        return own

    def lacking(self, replies: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return what has to be sent again because the server did not have the script."""
        sent = [command for command, _ in self._prepared if command is not None]
        at = [i for i, each in enumerate(replies) if isinstance(each, exceptions.NoScriptError)]
        again = [with_source(sent[i]) for i in at]
        if self._asking:
            self._asking = [self._asking[i] for i in at]
            return self._asked(again, self._asking)
        return again

    def answers(
        self, requests: Sequence[Request], replies: Sequence[Any], again: Sequence[Any]
    ) -> list[Answer]:
        rest, repeated = iter(replies), iter(again)
        answers: list[Answer] = []
        for request, (command, fresh) in zip(requests, self._prepared, strict=True):
            if command is None:
                acts = request.op is not Op.PUT
                answers.append(Answer(Outcome.DIFFERS) if acts else UNKNOWN)
                continue
            reply = next(rest)
            if isinstance(reply, exceptions.NoScriptError):
                reply = next(repeated)
            if isinstance(reply, exceptions.AskError):  # `MovedError` is one, too
                moved = isinstance(reply, exceptions.MovedError)
                where = Redirect(reply.slot_id, f"{reply.host}:{reply.port}", not moved)
                answers.append(Answer(Outcome.UNKNOWN, where))
                continue
            answers.append(answer_to(request, fresh, reply))
        return answers


class RedisConnection:
    """redis-py's connection, one batch at a time."""

    def __init__(self, node: Node, keeper: Keeper) -> None:
        self.is_used = False
        self._node = node
        self._keeper = keeper
        self._wire = _Wire(keeper.prefix)
        self._n = 0
        self._connection = keeper.made(node, Connection, Retry(NoBackoff(), 0))
        self._is_open = False
        self._term = 0

    def send(self, requests: Sequence[Request], deadline: Deadline) -> None:
        """Send requests; connect first if it is not connected."""
        with _Translated():
            if not self._is_open or self._term != self._node.term:
                self._open(deadline)
            commands = self._wire.commands(requests)
            self._n = len(commands)
            if commands:
                self._connection._sock.settimeout(deadline.left())
                self._ask(commands)

    def receive(self, requests: Sequence[Request], deadline: Deadline) -> list[Answer]:
        """Read the replies to what was sent."""
        with _Translated():
            replies, again = self._wire.replies(self._replies(self._n, deadline)), []
            if lacking := self._wire.lacking(replies):
                self._ask(lacking)
                again = self._wire.replies(self._replies(len(lacking), deadline))
            return self._wire.answers(requests, replies, again)

    def exchange_raw(self, command: tuple[Any, ...], deadline: Deadline) -> Any:
        """Send a command that is about no entry, and return the reply."""
        with _Translated():
            if not self._connection.is_connected:
                self._connect(deadline)
            self._ask([command])
            return self._replies(1, deadline)[0]

    def _open(self, deadline: Deadline) -> None:
        self._term = self._node.term
        if not self._is_open:
            self._connect(deadline)
        asks = self._keeper.asks(self._node)
        self._ask(asks)
        says = self._keeper.says(self._node, self._replies(len(asks), deadline))
        self._ask(says)
        self._replies(len(says), deadline)
        self._is_open = True

    def _connect(self, deadline: Deadline) -> None:
        connection = self._connection
        connection.socket_connect_timeout = connection.socket_timeout = deadline.left()
        connection.connect()

    def _ask(self, commands: Sequence[tuple[Any, ...]]) -> None:
        if commands:
            self._connection.send_packed_command(self._connection.pack_commands(commands))

    def _replies(self, n: int, deadline: Deadline) -> list[Any]:
        replies: list[Any] = []
        for _ in range(n):
            self._connection._sock.settimeout(deadline.left())
            try:
                replies.append(self._connection.read_response(disable_decoding=True))
            except exceptions.ResponseError as error:
                replies.append(error)
        return replies

    def shut(self) -> None:
        """Close it at once; a later call connects anew."""
        self._is_open = False
        self._connection.disconnect()


class AsyncRedisConnection:
    """The same for one event loop."""

    def __init__(self, node: Node, keeper: Keeper) -> None:
        self.is_used = False
        self._node = node
        self._keeper = keeper
        self._wire = _Wire(keeper.prefix)
        retry = async_redis.retry.Retry(NoBackoff(), 0)
        self._connection = keeper.made(node, async_connection.Connection, retry)
        self._is_open = False
        self._term = 0

    async def exchange(self, requests: Sequence[Request]) -> list[Answer]:
        """Send requests and read the replies; connect first if it is not connected."""
        with _Translated():
            if not self._is_open or self._term != self._node.term:
                self._term = self._node.term
                if not self._is_open:
                    await self._connection.connect()
                asked = await self._ask(self._keeper.asks(self._node))
                await self._ask(self._keeper.says(self._node, asked))
                self._is_open = True
            replies = self._wire.replies(await self._ask(self._wire.commands(requests)))
            again: list[Any] = []
            if lacking := self._wire.lacking(replies):
                again = self._wire.replies(await self._ask(lacking))
            return self._wire.answers(requests, replies, again)

    async def exchange_raw(self, command: tuple[Any, ...]) -> Any:
        """Send a command that is about no entry, and return the reply."""
        with _Translated():
            if not self._connection.is_connected:
                await self._connection.connect()
            return (await self._ask([command]))[0]

    async def _ask(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        connection = self._connection
        if commands:
            await connection.send_packed_command(connection.pack_commands(commands))
        replies: list[Any] = []
        for _ in commands:
            try:
                replies.append(await connection.read_response(disable_decoding=True))
            except exceptions.ResponseError as error:
                replies.append(error)
        return replies

    def shut(self) -> None:
        """Close it at once; a later call connects anew."""
        self._is_open = False
        writer, connection = self._connection._writer, self._connection
        connection._reader = connection._writer = None
        if writer is not None:
            with suppress(RuntimeError):  # its event loop is closed, and so is it
                writer.transport.abort()


class _Translated:
    """redis-py's errors as those of the operating system, which breakers know."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, exceptions.TimeoutError):
            raise TimeoutError(str(error)) from error
        if isinstance(error, exceptions.RedisError):
            raise ConnectionError(str(error)) from error
        if isinstance(error, (ValueError, IndexError, AttributeError)):
            raise ConnectionError("this is no Redis") from error  # its parser met other bytes
