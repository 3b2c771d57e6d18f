"""Which values may be shard keys."""

from __future__ import annotations

import enum
import unicodedata
import uuid
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.errors import InvalidShardKeyError
from shardkit.keys import MAX_KEY_BYTES, KeyType, canonical, checked

UUID = uuid.UUID("12345678-1234-5678-1234-56781234abcd")


class Colour(enum.StrEnum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Text(str):
    __slots__ = ()


REFUSED: dict[KeyType, list[object]] = {
    KeyType.INTEGER: [
        None, True, 1.0, "1", b"1", Decimal(1), Number.ONE, 1 << 63, -(1 << 63) - 1, 1 << 40_000, [1],
    ],
    KeyType.TEXT: [
        None, 1, True, b"a", Colour.RED, Text("a"), "a\0b", "\ud800", "e\u0301", "\u212b", ["a"],
        "a" * (MAX_KEY_BYTES + 1), "é" * (MAX_KEY_BYTES // 2 + 1), "x" * 10_000_000, UUID,
    ],
    KeyType.UUID: [
        None, "", 1, UUID.bytes, UUID.hex[:-1], "0x" + UUID.hex[2:], f" {UUID}", f"urn:uuid:{UUID}",
        UUID.hex.replace("1", "\u0661"), "1_" + UUID.hex[2:], "{" * 39, "x" * 10_000_000,
    ],
    KeyType.BYTES: [None, "a", 1, bytearray(b"a"), bytes(MAX_KEY_BYTES + 1)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key_type", "value"),
    [
        pytest.param(key_type, value, id=f"{key_type}-{n}")
        for key_type, values in REFUSED.items()
        for n, value in enumerate(values)
    ],
)
def test_what_cannot_be_a_key_is_refused_in_one_short_line(
    key_type: KeyType, value: object
) -> None:
    with pytest.raises(InvalidShardKeyError) as caught:
        checked(key_type, value)
    assert caught.value.hint, "says what to pass"
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@given(st.text(max_size=50))
def test_a_text_is_a_key_exactly_when_it_has_one_spelling_and_can_be_stored(text: str) -> None:
    fine = unicodedata.normalize("NFC", text) == text and "\0" not in text
    if fine:
        assert checked(KeyType.TEXT, text) == text
    else:
        with pytest.raises(InvalidShardKeyError):
            checked(KeyType.TEXT, text)


@given(st.text(max_size=50))
def test_both_normal_forms_of_a_text_have_one_canonical_form(text: str) -> None:
    assert canonical(unicodedata.normalize("NFD", text)) == canonical(
        unicodedata.normalize("NFC", text)
    )


@given(st.uuids(), st.sampled_from(["{}", "{{{}}}"]), st.booleans(), st.booleans())
def test_every_spelling_of_a_uuid_is_one_key(
    value: uuid.UUID, frame: str, upper: bool, bare: bool
) -> None:
    text = frame.format(value.hex if bare else value)
    assert checked(KeyType.UUID, text.upper() if upper else text) == value


@given(
    st.lists(
        st.one_of(st.text(max_size=5), st.integers(), st.uuids(), st.binary(max_size=5)),
        max_size=20,
    )
)
def test_different_keys_have_different_canonical_forms(values: list[object]) -> None:
    normal = {
        (type(v), unicodedata.normalize("NFC", v) if isinstance(v, str) else v) for v in values
    }
    assert len({canonical(value) for value in values}) == len(normal)


@pytest.mark.parametrize("value", [None, True, 1.5, ["a"], object()])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(InvalidShardKeyError):
        canonical(value)
