"""What is sealed can be read with its key, says nothing without it, and cannot be changed."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import AnswerLostError, problem_of
from app.sealing import FORM, SALT_BYTES, opened, sealed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
ANSWER = {"username": "ana.lima", "body": "What a light " * 20}


def bytes_of(text: str) -> bytes:
    return base64.b64decode(text.removeprefix(FORM))


@given(key=st.text(min_size=1, max_size=64), answer=JSON, of=st.text(max_size=64))
def test_the_key_opens_it(key: str, answer: Any, of: str) -> None:
    assert opened(key, sealed(key, answer, of=of), of=of) == answer


def test_no_two_have_a_key_or_a_text_in_common() -> None:
    texts = [bytes_of(sealed("a key", ANSWER, of="x")) for _ in range(100)]
    assert len({text[:SALT_BYTES] for text in texts}) == 100
    # Under one key and nonce, ciphertexts of one text would be equal from their beginning.
    assert len({text[SALT_BYTES:][:8] for text in texts}) == 100
    plain = json.dumps(ANSWER).encode()
    assert not any(plain[n : n + 6] in text for text in texts for n in range(len(plain) - 6))


@pytest.mark.parametrize(("key", "of"), [("another key", "x"), ("a key ", "x"), ("a key", "y")])
def test_another_key_or_another_request_does_not_open_it(key: str, of: str) -> None:
    with pytest.raises(AnswerLostError):
        opened(key, sealed("a key", ANSWER, of="x"), of=of)


@given(data=st.data())
def test_what_was_changed_is_found(data: st.DataObject) -> None:
    """Any bit, anywhere: salt, text or tag; also cut off, or with more behind it."""
    raw = bytearray(bytes_of(sealed("a key", ANSWER, of="x")))
    match data.draw(st.sampled_from(["bit", "cut", "more"])):
        case "bit":
            n = data.draw(st.integers(0, len(raw) * 8 - 1))
            raw[n // 8] ^= 1 << n % 8
        case "cut":
            del raw[data.draw(st.integers(0, len(raw) - 1)) :]
        case _:
            raw += data.draw(st.binary(min_size=1, max_size=20))
    with pytest.raises(AnswerLostError):
        opened("a key", FORM + base64.b64encode(raw).decode(), of="x")


@pytest.mark.parametrize(
    "text",
    [
        "",
        FORM,
        FORM + "no base64",
        FORM + "\xe9",
        # As this was done before: a salt of 16 bytes, and the exclusive or with a stream.
        "iZ9vYh3Yk2bT0mXw1n5K3kq0qf3m6aVtq8rR0w==",
        json.dumps(ANSWER),
    ],
)
def test_what_is_not_of_this_form_is_no_answer(text: str) -> None:
    with pytest.raises(AnswerLostError):
        opened("a key", text, of="x")


def test_clients_are_told_that_it_was_done_and_cannot_be_told_again() -> None:
    problem = problem_of(AnswerLostError())
    assert (problem.status, problem.type) == (409, "urn:shardkit-app:problem:answer-lost")
