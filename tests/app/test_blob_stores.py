"""One suite for every backend that keeps pictures, chosen by its name."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from app.photos.store import BlobStore
from tests.fixtures.blobs import BACKENDS

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("backend", BACKENDS)]

SMALL = {"1080.jpg": b"large" * 1000, "150.jpg": b"small"}


def name() -> str:
    return secrets.token_hex(12)


async def keys_of(blobs: BlobStore) -> set[str]:
    return {key async for key in blobs.iterate_keys()}


async def test_what_was_put_is_read_byte_by_byte(blobs: BlobStore) -> None:
    for size in (0, 1, 31, 32, 33, 65_536, 300_000):
        data = secrets.token_bytes(size)
        key = await blobs.put(name(), {"640.jpg": data, "150.jpg": data[::-1]})
        assert await blobs.get(key, "640.jpg") == data
        assert await blobs.get(key, "150.jpg") == data[::-1]
        assert await blobs.get(key, "1080.jpg") is None


async def test_the_key_ends_with_the_name(blobs: BlobStore) -> None:
    given = name()
    key = await blobs.put(given, SMALL)
    assert (key[8:], len(key)) == (given, 32)
    assert await keys_of(blobs) == {key}


async def test_the_same_again_is_allowed(blobs: BlobStore) -> None:
    given = name()
    keys = {await blobs.put(given, SMALL) for _ in range(2)}
    for key in keys:
        assert await blobs.get(key, "150.jpg") == b"small"
        await blobs.delete(key)
        assert await blobs.get(key, "150.jpg") is None
    assert await keys_of(blobs) == set()
    again = await blobs.put(given, SMALL)
    assert await blobs.get(again, "150.jpg") == b"small"


async def test_deleted_is_gone_and_others_stay(blobs: BlobStore) -> None:
    gone, kept = [await blobs.put(name(), SMALL) for _ in range(2)]
    for _ in range(2):
        await blobs.delete(gone)
        assert [await blobs.get(gone, variant) for variant in SMALL] == [None, None]
    assert await blobs.get(kept, "1080.jpg") == SMALL["1080.jpg"]
    assert await keys_of(blobs) == {kept}


async def test_many_at_once(blobs: BlobStore) -> None:
    datas = [secrets.token_bytes(2000 + n) for n in range(40)]
    keys = await asyncio.gather(*(blobs.put(name(), {"320.jpg": data}) for data in datas))
    assert len(set(keys)) == len(datas)
    found = await asyncio.gather(*(blobs.get(key, "320.jpg") for key in keys))
    assert found == datas
    assert await keys_of(blobs) == set(keys)


async def test_another_cookie_or_key_finds_nothing(blobs: BlobStore) -> None:
    key = await blobs.put(name(), SMALL)
    for at in (8, 20, 31):
        digit = "0" if key[at] != "0" else "1"
        guessed = key[:at] + digit + key[at + 1 :]
        assert await blobs.get(guessed, "150.jpg") is None
        await blobs.delete(guessed)
    assert await blobs.get(key, "150.jpg") == b"small"
    assert await blobs.get("0000ffff" + key[8:], "150.jpg") is None


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "0" * 31, "G" * 32, "0" * 31 + "\n"])
async def test_a_malformed_key_names_nothing(blobs: BlobStore, key: str) -> None:
    assert await blobs.get(key, "150.jpg") is None
    await blobs.delete(key)


@pytest.mark.parametrize(
    ("given", "variants"),
    [
        ("0" * 23, SMALL),
        ("../" * 8, SMALL),
        ("0" * 24, {}),
        ("0" * 24, {"../x.jpg": b""}),
        ("0" * 24, {"150.svg": b""}),
    ],
)
async def test_what_cannot_be_stored_is_refused(
    blobs: BlobStore, given: str, variants: dict[str, bytes]
) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        await blobs.put(given, variants)
    assert await keys_of(blobs) == set()


@pytest.mark.parametrize("variant", ["", "150", "0150.jpg", "150.png", "../150.jpg", "99999.jpg"])
async def test_a_variant_that_is_none_is_not_there(blobs: BlobStore, variant: str) -> None:
    key = await blobs.put(name(), SMALL)
    assert await blobs.get(key, variant) is None


async def test_close_twice(blobs: BlobStore) -> None:
    await blobs.put(name(), SMALL)
    await blobs.close()
    await blobs.close()
