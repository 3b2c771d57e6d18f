"""Bytes become messages, wherever the network cuts them."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest

from shardkit.testing.wire import Answer, Message, PostgresConversation, TcpConversation

STARTUP = struct.pack("!II", 8 + 13, 196608) + b"user\0shardkit"
READY = b"Z\0\0\0\5I"


def sent(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack("!I", 4 + len(body)) + body


LOGGED_IN = sent(b"R", b"\0\0\0\0") + READY
PARSE = sent(b"P", b"one\0SELECT $1\0\0\0")
BIND = sent(b"B", b"door\0one\0\0\0\0\0\0\0")
EXECUTE = sent(b"E", b"door\0\0\0\0\0")
SYNC = sent(b"S")


def opened() -> PostgresConversation:
    conversation = PostgresConversation()
    assert [m.kind for m in conversation.from_client(STARTUP)] == ["startup"]
    conversation.from_server(LOGGED_IN[:-1])
    before = conversation.is_open
    conversation.from_server(LOGGED_IN[-1:])
    assert (before, conversation.is_open) == (False, True)
    return conversation


@pytest.mark.parametrize("size", [1, 2, 5, 7, 1000])
def test_what_is_executed_is_traced_to_its_text_however_it_is_cut(size: int) -> None:
    stream = sent(b"Q", b"BEGIN\0") + PARSE + BIND + EXECUTE + SYNC + sent(b"Q", b"COMMIT\0")
    conversation = opened()
    messages: list[Message] = []
    for at in range(0, len(stream), size):
        messages += conversation.from_client(stream[at : at + size])
    assert b"".join(message.raw for message in messages) == stream
    assert [(m.kind, m.text, m.answer) for m in messages] == [
        ("Q", "BEGIN", 1),
        ("P", "SELECT $1", 2),
        ("B", "SELECT $1", 2),
        ("E", "SELECT $1", 2),
        ("S", None, 2),
        ("Q", "COMMIT", 3),
    ]
    assert [m.text for m in messages if m.is_statement] == ["BEGIN", "SELECT $1", "COMMIT"]


@pytest.mark.parametrize("size", [1, 3, 6, 1000])
def test_answers_end_where_the_server_is_ready(size: int) -> None:
    first, second = sent(b"C", b"BEGIN\0") + READY, sent(b"1") + sent(b"D", bytes(300)) + READY
    conversation = opened()
    pieces: list[Answer] = []
    for at in range(0, len(first + second), size):
        pieces += conversation.from_server((first + second)[at : at + size])
    assert b"".join(piece.raw for piece in pieces) == first + second
    assert b"".join(piece.raw for piece in pieces if piece.number == 1) == first
    assert [piece.number for piece in pieces if piece.is_end] == [1, 2]
    assert all(a.number <= b.number for a, b in pairwise(pieces))


def test_a_statement_that_is_closed_is_forgotten() -> None:
    conversation = opened()
    conversation.from_client(PARSE + BIND)
    closed = conversation.from_client(sent(b"C", b"Sone\0") + BIND + EXECUTE)
    assert closed[-1].text == ""


def test_requests_for_encryption_are_refused_or_carried_blindly() -> None:
    request = struct.pack("!II", 8, 80877103)
    conversation = PostgresConversation()
    assert [m.kind for m in conversation.from_client(request)] == ["startup"]
    conversation.from_server(b"N")
    conversation.from_client(STARTUP)
    conversation.from_server(LOGGED_IN)
    assert conversation.from_client(sent(b"Q", b"SELECT\0"))[0].text == "SELECT"

    conversation = PostgresConversation()
    conversation.from_client(request)
    conversation.from_server(b"S")
    assert conversation.from_client(b"\x16\x03\x01")[0].raw == b"\x16\x03\x01"
    assert conversation.from_server(b"\x16\x03\x03")[0].raw == b"\x16\x03\x03"


def test_a_sync_that_copy_swallows_has_no_answer() -> None:
    conversation = opened()
    conversation.from_client(PARSE + BIND + EXECUTE + SYNC)
    copied = conversation.from_client(sent(b"d", b"1\n") + sent(b"c") + SYNC)
    assert [m.answer for m in copied] == [1, 1, 1]
    assert conversation.from_client(sent(b"Q", b"COMMIT\0"))[0].answer == 2


def test_other_protocols_have_pieces() -> None:
    conversation = TcpConversation()
    assert conversation.from_client(b"get a\r\n") == [Message(b"get a\r\n", "tcp", "get a\r\n", 1)]
    assert conversation.from_server(b"END\r\n") == [Answer(b"END\r\n", 1, is_end=True)]
