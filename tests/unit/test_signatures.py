"""Signed tokens: what is accepted back."""

from __future__ import annotations

import pytest

from shardkit.errors import ConfigurationError
from shardkit.signatures import Signer

OLD, NEW = "an old key of 16 bytes", b"a newer key of 16 bytes"
TOKEN = "1~a.1.1.18.3"


def test_what_was_signed_is_opened() -> None:
    signed = Signer([NEW]).sign(TOKEN)
    assert Signer([NEW]).open(signed) == TOKEN


def test_keys_rotate() -> None:
    before = Signer([OLD]).sign(TOKEN)
    rotated = Signer([NEW, OLD])
    assert rotated.open(before) == TOKEN
    assert Signer([NEW]).open(rotated.sign(TOKEN)) == TOKEN
    assert Signer([NEW]).open(before) is None


def test_every_changed_character_is_noticed() -> None:
    signer = Signer([NEW])
    signed = signer.sign(TOKEN)
    for place, character in enumerate(signed):
        changed = signed[:place] + ("0" if character != "0" else "1") + signed[place + 1 :]
        assert signer.open(changed) is None, place
        assert signer.open(signed[:place]) is None, place


@pytest.mark.parametrize("text", ["", ".", TOKEN, f"{TOKEN}.", "x" * 10_000_000, "é.é", "1.\x00"])
def test_what_is_not_signed_is_refused(text: str) -> None:
    assert Signer([NEW]).open(text) is None


@pytest.mark.parametrize("keys", [[], [""], ["short"], [NEW, "short"]])
def test_weak_keys_are_refused(keys: list[str | bytes]) -> None:
    with pytest.raises(ConfigurationError, match="16 bytes"):
        Signer(keys)
