"""Redis for threads and for asyncio: one script an operation, one round trip per server.

    cache = Redis(["redis://10.0.0.1:6379/0", "redis://10.0.0.2:6379/0"])

redis-py makes the connections, with their logins and TLS; batches are run as Memcached's are.
A Redis may come back with the data of an earlier moment, from its file or from a replica. So a
server that is found in another life (`run_id`) than before is dirty until it has been flushed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from redis import asyncio as async_redis
from redis import exceptions
from redis.asyncio import connection as async_connection
from redis.backoff import NoBackoff
from redis.connection import Connection
from redis.connection import parse_url as _parse_url
from redis.retry import Retry

from shardkit.caches.async_served import AsyncServedCache
from shardkit.caches.backend import DEADLINE
from shardkit.caches.nodes import CACHE_RULES, Node, Nodes
from shardkit.caches.scripts import Prepared, answer_to, prepare, with_source
from shardkit.caches.served import Deadline, ServedCache
from shardkit.caching.operations import UNKNOWN, Answer, Op, Outcome, Request
from shardkit.clock import SYSTEM, Clock
from shardkit.windows import BreakerRules

parse_url: Final[Callable[[str], dict[str, Any]]] = _parse_url

__all__ = ["AsyncRedis", "Redis"]

_FLUSH_TIME: Final = 5.0
_PREFIX: Final = "shardkit:cache:"


def _life_commands(prefix: str) -> list[tuple[Any, ...]]:
    """Return what a new connection asks: which life this is, and of which life the data are."""
    key = f"{prefix}life".encode()
    return [(b"INFO", b"server"), (b"GET", key)]


def _note_life(nodes: Nodes, node: Node, info: Any, of_data: Any) -> bytes:
    """Refuse a server whose data are of another life; return which life it is in.

    The data say themselves: processes that begin after the restart have to know, too.
    """
    text = info if isinstance(info, bytes) else b""
    lines = [line for line in text.splitlines() if line.startswith(b"run_id:")]
    if not lines or isinstance(of_data, Exception):
        raise ConnectionError("this is no Redis")
    if of_data is not None and of_data != lines[0] and not node.must_flush:
        node.must_flush = True
        nodes.soil(node)
    if node.must_flush and not node.is_gutter:
        raise _CameBackError
    return lines[0]


class _CameBackError(ConnectionError):
    """The server holds the data of another life."""


class _Wire:
    """What both kinds of connection know: how requests are sent and replies understood."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._prepared: list[Prepared] = []

    def commands(self, requests: Sequence[Request]) -> list[tuple[Any, ...]]:
        self._prepared = [prepare(request, self._prefix) for request in requests]
        return [command for command, _ in self._prepared if command is not None]

    def lacking(self, replies: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return what has to be sent again because the server did not have the script."""
        sent = (command for command, _ in self._prepared if command is not None)
        return [
            with_source(command)
            for command, reply in zip(sent, replies, strict=True)
            if isinstance(reply, exceptions.NoScriptError)
        ]

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
            answers.append(answer_to(request, fresh, reply))
        return answers


class _Connection:
    """redis-py's connection, one batch at a time."""

    def __init__(self, node: Node, url: str, prefix: str, nodes: Nodes) -> None:
        self.is_used = False
        self._node = node
        self._wire = _Wire(prefix)
        self._nodes = nodes
        self._prefix = prefix
        self._n = 0
        self._connection = _made(url, Connection, Retry(NoBackoff(), 0))
        self._is_open = False

    def send(self, requests: Sequence[Request], deadline: Deadline) -> None:
        connection = self._connection
        with _Translated():
            if not self._is_open:
                connection.socket_connect_timeout = connection.socket_timeout = deadline.left()
                connection.connect()
                self._ask(_life_commands(self._prefix))
                life = _note_life(self._nodes, self._node, *self._replies(2, deadline))
                self._ask([(b"SET", f"{self._prefix}life".encode(), life)])
                self._replies(1, deadline)
                self._is_open = True
            commands = self._wire.commands(requests)
            self._n = len(commands)
            if commands:
                connection._sock.settimeout(deadline.left())
                connection.send_packed_command(connection.pack_commands(commands))

    def receive(self, requests: Sequence[Request], deadline: Deadline) -> list[Answer]:
        with _Translated():
            replies, again = self._replies(self._n, deadline), []
            if lacking := self._wire.lacking(replies):
                self._connection.send_packed_command(self._connection.pack_commands(lacking))
                again = self._replies(len(lacking), deadline)
            return self._wire.answers(requests, replies, again)

    def _ask(self, commands: Sequence[tuple[Any, ...]]) -> None:
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
        self._is_open = False
        self._connection.disconnect()


class _AsyncConnection:
    """The same for one event loop."""

    def __init__(self, node: Node, url: str, prefix: str, nodes: Nodes) -> None:
        self.is_used = False
        self._node = node
        self._wire = _Wire(prefix)
        self._nodes = nodes
        self._prefix = prefix
        retry = async_redis.retry.Retry(NoBackoff(), 0)
        self._connection = _made(url, async_connection.Connection, retry)
        self._is_open = False

    async def exchange(self, requests: Sequence[Request]) -> list[Answer]:
        with _Translated():
            if not self._is_open:
                await self._connection.connect()
                asked = await self._ask(_life_commands(self._prefix))
                life = _note_life(self._nodes, self._node, *asked)
                await self._ask([(b"SET", f"{self._prefix}life".encode(), life)])
                self._is_open = True
            replies, again = await self._ask(self._wire.commands(requests)), []
            if lacking := self._wire.lacking(replies):
                again = await self._ask(lacking)
            return self._wire.answers(requests, replies, again)

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


def _made(url: str, default: Any, retry: Any) -> Any:
    settings = parse_url(url)
    kind = settings.pop("connection_class", default)
    if default is async_connection.Connection and kind is not default:
        kind = getattr(async_connection, kind.__name__)
    return kind(**settings, retry=retry, protocol=2, health_check_interval=0)


def _named(urls: Sequence[str]) -> dict[str, str]:
    """Return addresses by names without logins."""
    named: dict[str, str] = {}
    for url in urls:
        parts = parse_url(url)
        where = parts.get("path") or f"{parts.get('host', 'localhost')}:{parts.get('port', 6379)}"
        named[f"{where}/{parts.get('db', 0)}"] = url
    return named


class Redis(ServedCache):
    """A static ring of Redis servers.

    Args:
        servers: addresses, as `redis://user:password@host:port/database`.
        gutter: servers that stand in, for seconds, for those that are left alone.
        prefix: before every key; what `flush` deletes.
        deadline: seconds a call may take.
        connections: most connections to each server.
        rules: of the breakers.
        clock: source of time.
        on_dirty: called with the name of a server that has become dirty.
    """

    def __init__(
        self,
        servers: Sequence[str],
        *,
        gutter: Sequence[str] = (),
        prefix: str = _PREFIX,
        deadline: float = DEADLINE,
        connections: int = 32,
        rules: BreakerRules = CACHE_RULES,
        clock: Clock = SYSTEM,
        on_dirty: Callable[[str], None] | None = None,
    ) -> None:
        homes, extra = _named(servers), _named(gutter)
        self._urls, self._prefix = {**homes, **extra}, prefix
        nodes = Nodes([*homes], gutter=[*extra], rules=rules, clock=clock, on_dirty=on_dirty)
        super().__init__(
            nodes,
            lambda node: _Connection(node, self._urls[node.name], prefix, nodes),
            deadline=deadline,
            connections=connections,
            clock=clock,
        )

    def flush(self, name: str) -> bool:
        """Delete every entry of a server and read it again; return whether it answered."""
        from redis import Redis as Client  # noqa: PLC0415  the same name

        retry = Retry(NoBackoff(), 0)
        client = Client.from_url(self._urls[name], socket_timeout=_FLUSH_TIME, retry=retry)
        try:
            for key in client.scan_iter(match=f"{self._prefix}*", count=1000):
                client.unlink(
                    key
                )  # the key that tells the life, too: the next connection writes it
        except (OSError, exceptions.RedisError):
            return False
        finally:
            client.close()
        self.nodes.flushed(name)
        return True


class AsyncRedis(AsyncServedCache):
    """The same for asyncio; the arguments are those of `Redis`."""

    def __init__(
        self,
        servers: Sequence[str],
        *,
        gutter: Sequence[str] = (),
        prefix: str = _PREFIX,
        deadline: float = DEADLINE,
        connections: int = 32,
        rules: BreakerRules = CACHE_RULES,
        clock: Clock = SYSTEM,
        on_dirty: Callable[[str], None] | None = None,
    ) -> None:
        homes, extra = _named(servers), _named(gutter)
        self._urls, self._prefix = {**homes, **extra}, prefix
        nodes = Nodes([*homes], gutter=[*extra], rules=rules, clock=clock, on_dirty=on_dirty)
        super().__init__(
            nodes,
            lambda node: _AsyncConnection(node, self._urls[node.name], prefix, nodes),
            deadline=deadline,
            connections=connections,
        )

    async def flush(self, name: str) -> bool:
        """Delete every entry of a server and read it again; return whether it answered."""
        client = async_redis.Redis.from_url(self._urls[name], socket_timeout=_FLUSH_TIME)
        try:
            async with asyncio.timeout(_FLUSH_TIME):
                async for key in client.scan_iter(match=f"{self._prefix}*", count=1000):
                    await client.unlink(key)
        except (OSError, exceptions.RedisError):
            return False
        finally:
            await client.aclose()
        self.nodes.flushed(name)
        return True
