"""What Redis is asked, as commands and Lua, and what its replies mean. No I/O.

An entry is a string: sixteen random bytes that name its state, then the bytes that Memcached
would hold. Whoever writes draws the sixteen, so a state's name never comes again, whatever
restarts. One script an operation; each touches one key, so they work on a Redis Cluster too.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
from collections.abc import Sequence
from typing import Any, Final

from shardkit.caching.entries import LARGEST_ENTRY, decode, encode
from shardkit.caching.operations import UNKNOWN, Answer, Op, Outcome, Request

__all__ = ["SCRIPTS", "Prepared", "answer_to", "prepare", "with_source"]

_NAME: Final = 16

# pcall: a key may hold a list or a hash of somebody else's, which is garbage.
_LEASE: Final = b"""
local held = redis.pcall('GET', KEYS[1])
if held then return type(held) == 'table' and '!' or held end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return false
"""
_STORE: Final = b"""
local held = redis.pcall('GET', KEYS[1])
if type(held) ~= 'string' or string.sub(held, 1, 16) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""
_REMOVE: Final = b"""
local held = redis.pcall('GET', KEYS[1])
local name = type(held) == 'table' and '!' or held and string.sub(held, 1, 16)
if name ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
return 1
"""
_READ: Final = b"""
local held = redis.pcall('GET', KEYS[1])
return type(held) == 'table' and '!' or held
"""
SCRIPTS: Final = {Op.LEASE: _LEASE, Op.STORE: _STORE, Op.REMOVE: _REMOVE, Op.READ: _READ}
_SHA: Final = {op: hashlib.sha1(text).hexdigest().encode() for op, text in SCRIPTS.items()}  # noqa: S324

Prepared = tuple[tuple[Any, ...] | None, bytes]
"""A command, or None when it need not be sent; and the name of the state it would write."""


class _Names:
    """Names of states: eight random bytes of this process, and a count."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._mine = secrets.token_bytes(8)
        self._count = itertools.count(1)

    def draw(self) -> bytes:
        return self._mine + next(self._count).to_bytes(8, "big")


_NAMES: Final = _Names()


def prepare(request: Request, prefix: str) -> Prepared:
    """Return the command for a request."""
    op, key, cas, kind, version, payload, ttl = request
    name = (prefix + key).encode()
    if op is Op.READ:
        return (b"EVALSHA", _SHA[op], 1, name), b""
    if op is Op.DELETE:
        return (b"DEL", name), b""
    fresh = _NAMES.draw()
    life = max(1, round(ttl * 1000))
    if op is Op.LEASE:
        return (b"EVALSHA", _SHA[op], 1, name, fresh, life), fresh
    if op is Op.REMOVE:
        return (b"EVALSHA", _SHA[op], 1, name, cas) if type(cas) is bytes else None, b""
    data = encode(kind, version, payload)
    if len(data) > LARGEST_ENTRY:
        return None, b""
    if op is Op.PUT:
        return (b"SET", name, fresh + data, b"PX", life), fresh
    if type(cas) is not bytes:  # of another kind of server
        return None, b""
    return (b"EVALSHA", _SHA[op], 1, name, cas, fresh + data, life), fresh


def with_source(command: Sequence[Any]) -> tuple[Any, ...]:
    """Return a command with the script itself in place of its digest, which the server lacks."""
    op = next(op for op, sha in _SHA.items() if sha == command[1])
    return (b"EVAL", SCRIPTS[op], *command[2:])


def answer_to(request: Request, fresh: bytes, reply: Any) -> Answer:
    """Return what a reply means; errors of the server are `UNKNOWN`."""
    op = request.op
    if isinstance(reply, Exception):
        return UNKNOWN
    if op is Op.LEASE or op is Op.READ:
        if reply is None:
            won = op is Op.LEASE
            return Answer(Outcome.WON, fresh) if won else Answer(Outcome.NOTHING)
        if type(reply) is not bytes:
            return UNKNOWN
        data = reply[_NAME:] if len(reply) >= _NAME else b"!"
        return decode(data, reply[:_NAME])
    if op is Op.DELETE:
        return Answer(Outcome.DONE)
    if op is Op.PUT:
        return Answer(Outcome.DONE, fresh)
    if reply == 1:
        return Answer(Outcome.DONE, fresh or None)
    return Answer(Outcome.DIFFERS)
