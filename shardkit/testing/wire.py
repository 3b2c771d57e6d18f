"""Cuts a conversation into messages: what a client asks, and which answer belongs to it.

PostgreSQL's protocol, version 3, and plain TCP, in which every piece that arrives is a message.
Pure: bytes in, messages out. Used by `shardkit.testing.proxy`; never changes a byte.

Source: PostgreSQL manual, "Frontend/Backend Protocol", "Message Formats".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Answer", "Conversation", "Message", "PostgresConversation", "TcpConversation"]

_CANCEL, _TLS, _GSS = 80877102, 80877103, 80877104
_LOGIN = 0
_HEAD = struct.Struct("!cI")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a client.

    Attributes:
        raw: its bytes, all of them.
        kind: PostgreSQL's letter (`Q`, `P`, `B`, `E` …), `startup`, `cancel`, or `tcp`.
        text: SQL that it sends, prepares, binds or executes; None when it has none.
        answer: number of the answer it is part of, from 1; 0 during login.
    """

    raw: bytes
    kind: str
    text: str | None
    answer: int

    @property
    def is_statement(self) -> bool:
        """Whether it makes the server run something."""
        return self.kind in {"Q", "E", "tcp"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A piece of an answer of the server.

    Attributes:
        raw: its bytes.
        number: which answer, counted as in `Message.answer`.
        is_end: whether the answer ends with it.
    """

    raw: bytes
    number: int
    is_end: bool


class Conversation(Protocol):
    """Both directions of one connection.

    Attributes:
        is_open: whether the login is over.
    """

    is_open: bool

    def from_client(self, data: bytes) -> list[Message]:
        """Return the messages that these bytes complete; possibly none."""

    def from_server(self, data: bytes) -> list[Answer]:
        """Return these bytes, all of them, cut where an answer ends."""


class TcpConversation:
    """Any protocol: each piece from the client is a message, each from the server its answer."""

    is_open = True

    def __init__(self) -> None:
        self._asked = 0

    def from_client(self, data: bytes) -> list[Message]:
        """Return the piece as a message; its text is the bytes as Latin-1."""
        self._asked += 1
        return [Message(data, "tcp", data.decode("latin-1"), self._asked)]

    def from_server(self, data: bytes) -> list[Answer]:
        """Return the piece as the whole answer to the last message."""
        return [Answer(data, self._asked, is_end=True)]


class PostgresConversation:
    """One connection to PostgreSQL or PgBouncer.

    An answer ends with ReadyForQuery, so that everything up to one Sync shares one answer. A
    message of the client is kept until it is complete, however long. An encrypted connection is
    carried and not understood.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._asking = bytearray()
        self._is_starting = True
        self._is_encrypted = False
        self._bytes_due = 0  # answers of one byte, to a request for encryption
        self._statements: dict[bytes, str] = {}
        self._portals: dict[bytes, str] = {}
        self._asked = 1
        self._last = ""
        self._answering = _LOGIN
        self._head = b""
        self._left = 0

    def from_client(self, data: bytes) -> list[Message]:
        """Return the messages that these bytes complete."""
        if self._is_encrypted:
            return [Message(data, "encrypted", None, self._asked)]
        self._asking += data
        messages = []
        while (message := self._next()) is not None:
            messages.append(message)
        return messages

    def from_server(self, data: bytes) -> list[Answer]:
        """Return these bytes, cut after each ReadyForQuery."""
        pieces: list[Answer] = []
        begin = at = 0
        while self._bytes_due and at < len(data):
            self._bytes_due -= 1
            self._is_encrypted = self._is_encrypted or data[at : at + 1] in {b"S", b"G"}
            at += 1
        if self._is_encrypted:
            return [Answer(data, self._answering, is_end=False)]
        while at < len(data):
            if self._left == 0:
                more = data[at : at + _HEAD.size - len(self._head)]
                self._head += more
                at += len(more)
                if len(self._head) < _HEAD.size:
                    break
                self._left = _HEAD.unpack(self._head)[1] - 4
            step = min(self._left, len(data) - at)
            self._left -= step
            at += step
            if self._left == 0:
                if self._head.startswith(b"Z"):
                    pieces.append(Answer(data[begin:at], self._answering, is_end=True))
                    begin = at
                    self._answering += 1
                    self.is_open = True
                self._head = b""
        if begin < len(data):
            pieces.append(Answer(data[begin:], self._answering, is_end=False))
        return pieces

    def _next(self) -> Message | None:
        """Take the next message off the bytes at hand, or return None when it is not complete."""
        if self._is_starting:
            if len(self._asking) < 8:
                return None
            length, code = struct.unpack_from("!II", self._asking)
            return self._startup(code, length) if len(self._asking) >= length else None
        if len(self._asking) < _HEAD.size:
            return None
        kind, length = _HEAD.unpack_from(self._asking)
        if len(self._asking) < length + 1:
            return None
        return self._message(kind.decode("ascii", "replace"), self._take(length + 1))

    def _startup(self, code: int, length: int) -> Message:
        raw = self._take(length)
        if code in {_TLS, _GSS}:
            self._bytes_due += 1
        else:
            self._is_starting = False
        return Message(raw, "cancel" if code == _CANCEL else "startup", None, _LOGIN)

    def _message(self, kind: str, raw: bytes) -> Message:
        body = raw[_HEAD.size :]
        text: str | None = None
        if kind == "Q":
            text = _decoded(body.partition(b"\0")[0])
        elif kind == "P":
            name, _, rest = body.partition(b"\0")
            text = self._statements[name] = _decoded(rest.partition(b"\0")[0])
        elif kind == "B":
            portal, _, rest = body.partition(b"\0")
            # A statement unknown here was prepared on another connection, behind a pooler.
            text = self._statements.get(rest.partition(b"\0")[0], "")
            self._portals[portal] = text
        elif kind == "E":
            text = self._portals.get(body.partition(b"\0")[0], "")
        elif kind == "C":
            known = self._statements if body.startswith(b"S") else self._portals
            known.pop(body[1:].partition(b"\0")[0], None)
        elif kind in "dcf" and self._last == "S":
            self._asked -= 1  # the server ignores a Sync when COPY begins
        message = Message(raw, kind, text, self._asked if self.is_open else _LOGIN)
        if kind in "QSF":
            self._asked += 1
        self._last = kind
        return message

    def _take(self, length: int) -> bytes:
        raw = bytes(self._asking[:length])
        del self._asking[:length]
        return raw


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "replace")
