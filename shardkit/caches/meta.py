"""Memcached's meta protocol: requests to bytes, bytes to answers. No I/O.

Read by the connections of threads and those of asyncio alike. `mg` with `N` reads or makes a
lease in one step, `ms` and `md` with `C` act on one state of an entry only. Flags of servers from
1.6.27 on (`E`, `x`) are not needed: what they would close, a server that counts its CAS numbers
anew, is closed by knowing which life of the server a number is from (`hello`).

Source: memcached, doc/protocol.txt, "Meta Commands". Never `I` with `ms`: it stores on a *lower*
CAS number too, and calls it stale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from shardkit.caching.entries import LARGEST_ENTRY, decode, encode
from shardkit.caching.operations import UNKNOWN, Answer, Op, Outcome, Request

__all__ = [
    "LIFE_KEY",
    "Life",
    "ProtocolViolation",
    "Replies",
    "answers_of",
    "hello",
    "life_of",
    "quick_answer",
    "render",
]

LIFE_KEY: Final = "shardkit:life"
"""Its entry says which life of the server this is: the first who connects writes a random text.

When it is evicted the next connection writes another: numbers from before are then refused for
nothing, which costs a repair and hurts nobody.
"""

_LONGEST_TTL: Final = 30 * 24 * 3600
"""Memcached reads larger numbers as a date."""
_LONGEST_LINE: Final = 8192
_LARGEST_VALUE: Final = 2 * LARGEST_ENTRY


class ProtocolViolation(ConnectionError):  # noqa: N818  says what happened; never leaves this package
    """What answers is no Memcached of ours, or the connection is out of step."""


class Life(NamedTuple):
    """One life of one server.

    Attributes:
        node: its name.
        text: what it was given when it was empty.
    """

    node: str
    text: bytes


class Reply(NamedTuple):
    """One reply.

    Attributes:
        code: `VA`, `HD`, `EN`, `NF`, `EX`, `NS` or `SERVER_ERROR`.
        cas: number it names, or None.
        won: whether a lease was won.
        data: of `VA`.
    """

    code: bytes
    cas: int | None = None
    won: bool = False
    data: bytes = b""


def hello(text: bytes) -> bytes:
    """Return what a new connection sends first: give the server a life if it has none, read it."""
    key = LIFE_KEY.encode()
    return b"ms %b %d ME T0\r\n%b\r\nmg %b v\r\n" % (key, len(text), text, key)


def life_of(node: str, replies: Replies) -> Life:
    """Return which life of a server it says this is, in reply to `hello`.

    Raises:
        ProtocolViolation: it keeps nothing, or is no Memcached of ours.
    """
    said = replies.replies[1]
    if said.code != b"VA" or not said.data:
        raise ProtocolViolation("the server keeps nothing")
    return Life(node, said.data)


def render(requests: Sequence[Request], life: Life) -> tuple[bytes, list[int]]:
    """Return the bytes of requests, and the places of those that have to be sent.

    What acts on a state that this server cannot have is not sent; see `answers_of`.
    """
    if len(requests) == 1 and requests[0].op is Op.LEASE:  # nearly always
        return b"mg %b N%d v c\r\n" % (requests[0].key.encode(), _ttl(requests[0].ttl)), [0]
    parts: list[bytes] = []
    sent: list[int] = []
    for index, (op, key, cas, kind, version, payload, ttl) in enumerate(requests):
        name = key.encode()
        if op is Op.LEASE:
            parts.append(b"mg %b N%d v c\r\n" % (name, _ttl(ttl)))
        elif op is Op.READ:
            parts.append(b"mg %b v c\r\n" % name)
        elif op is Op.DELETE:
            parts.append(b"md %b\r\n" % name)
        elif op is Op.PUT:
            data = encode(kind, version, payload)
            if len(data) > LARGEST_ENTRY:
                continue
            parts.append(b"ms %b %d T%d c\r\n%b\r\n" % (name, len(data), _ttl(ttl), data))
        else:
            number = _number(cas, life)
            if number is None:
                continue
            if op is Op.REMOVE:
                parts.append(b"md %b C%d\r\n" % (name, number))
            else:
                data = encode(kind, version, payload)
                if len(data) > LARGEST_ENTRY:
                    continue
                parts.append(
                    b"ms %b %d C%d T%d c\r\n%b\r\n" % (name, len(data), number, _ttl(ttl), data)
                )
        sent.append(index)
    return b"".join(parts), sent


def answers_of(
    requests: Sequence[Request], sent: Sequence[int], replies: Sequence[Reply], life: Life
) -> list[Answer]:
    """Return the answer to each request."""
    if len(requests) == 1 == len(sent):
        return [_answer(requests[0], replies[0], life)]
    if len(sent) == len(requests):
        return [_answer(r, reply, life) for r, reply in zip(requests, replies, strict=True)]
    answers = [Answer(Outcome.DIFFERS) if r.cas is not None else UNKNOWN for r in requests]
    for index, reply in zip(sent, replies, strict=True):
        answers[index] = _answer(requests[index], reply, life)
    return answers


def quick_answer(data: bytes, life: Life) -> Answer | None:
    """Return the answer that one value is, with its CAS number and nothing else; else None.

    What `Replies` and `answers_of` would say, for what nearly every reply to one request is.
    """
    if data[:3] != b"VA " or data[-2:] != b"\r\n":
        return None
    end = data.find(b"\r\n", 3, 60)
    size, _, number = data[3:end].partition(b" c")
    if not (size.isdigit() and number.isdigit() and len(number) <= 20):
        return None
    if len(data) != end + 4 + int(size):
        return None
    return decode(data[end + 2 : -2], (life, int(number)))


def _answer(request: Request, reply: Reply, life: Life) -> Answer:
    code, cas, won, data = reply
    if code == b"VA":
        token = (life, cas)
        return Answer(Outcome.WON, token) if won else decode(data, token)
    op = request.op
    if code == b"HD":
        return Answer(Outcome.DONE, None if cas is None else (life, cas))
    if code == b"EN" and op is Op.READ:
        return Answer(Outcome.NOTHING)
    if code == b"NF" and op is Op.DELETE:
        return Answer(Outcome.DONE)
    if code in {b"EX", b"NF", b"NS"} and op in {Op.STORE, Op.REMOVE}:
        return Answer(Outcome.DIFFERS)
    return UNKNOWN


def _number(cas: object, life: Life) -> int | None:
    """Return the number of a state, or None when it is of another server or another life."""
    if type(cas) is tuple and len(cas) == 2 and cas[0] == life and type(cas[1]) is int:
        return cas[1]
    return None


def _ttl(seconds: float) -> int:
    return min(max(1, math.ceil(seconds)), _LONGEST_TTL)


class Replies:
    """Reads replies out of bytes as they arrive.

    Args:
        n: how many are expected.

    Attributes:
        replies: those that are complete.
    """

    __slots__ = ("_buffer", "_n", "replies")

    def __init__(self, n: int) -> None:
        self._n = n
        self._buffer = b""
        self.replies: list[Reply] = []

    @property
    def is_complete(self) -> bool:
        """Whether all have arrived."""
        return len(self.replies) >= self._n

    def feed(self, data: bytes) -> None:
        """Take in what has arrived.

        Raises:
            ProtocolViolation: this is no Memcached, or more arrived than was asked for.
        """
        buffer = self._buffer + data if self._buffer else data
        at = 0
        replies = self.replies
        while len(replies) < self._n:
            end = buffer.find(b"\r\n", at, at + _LONGEST_LINE)
            if end < 0:
                if len(buffer) - at >= _LONGEST_LINE:
                    raise ProtocolViolation("a line without end")
                break
            words = buffer[at:end].split(b" ")
            code = words[0]
            cas, won, value = None, False, b""
            if code == b"VA":
                size = _size(words)
                after = end + 2 + size
                if len(buffer) < after + 2:
                    break
                if buffer[after : after + 2] != b"\r\n":
                    raise ProtocolViolation("a value without end")
                value = buffer[end + 2 : after]
                flags, end = words[2:], after
            elif code in _CODES:
                flags = words[1:]
            else:
                raise ProtocolViolation(f"unexpected reply {buffer[at : at + 40]!r}")
            if code != b"SERVER_ERROR":
                for flag in flags:
                    if flag == b"W":
                        won = True
                    elif flag[:1] == b"c":
                        cas = _integer(flag[1:])
            replies.append(Reply(code, cas, won, value))
            at = end + 2
        self._buffer = buffer[at:]
        if self._buffer and len(replies) >= self._n:
            raise ProtocolViolation("more replies than requests")


_CODES: Final = frozenset({b"HD", b"EN", b"NF", b"EX", b"NS", b"SERVER_ERROR"})


def _size(words: list[bytes]) -> int:
    try:
        size = int(words[1])
    except (IndexError, ValueError):
        size = -1
    if not 0 <= size <= _LARGEST_VALUE:
        raise ProtocolViolation("a value of no sensible size")
    return size


def _integer(text: bytes) -> int:
    if text.isdigit() and len(text) <= 20:
        return int(text)
    raise ProtocolViolation("no number where one belongs")
