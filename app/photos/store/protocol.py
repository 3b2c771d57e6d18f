"""The seam between the photo service and whatever keeps the bytes of pictures.

A picture is kept as variants: sizes and formats, named as files are, `1080.jpg`. What is stored
never changes, so an address can be kept by browsers and proxies for ever.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from typing import Final, Protocol

__all__ = [
    "MEDIA_TYPES",
    "NAME_DIGITS",
    "BlobStore",
    "DamagedBlobError",
    "StoreUnavailableError",
    "is_blob_key",
    "is_name",
    "is_variant",
]

NAME_DIGITS: Final = 24
"""Hexadecimal digits of a name: 64 bits of key and 32 of cookie, as a needle has them."""

MEDIA_TYPES: Final = {"jpg": "image/jpeg", "webp": "image/webp"}
"""Formats by the ending of a variant."""

_KEY: Final = re.compile(r"[0-9a-f]{32}")
_NAME: Final = re.compile(r"[0-9a-f]{24}")
_VARIANT: Final = re.compile(r"[1-9][0-9]{0,3}\.(jpg|webp)", re.ASCII)


def is_blob_key(text: str) -> bool:
    """Tell whether a text has the form of a blob key: 32 lower-case hexadecimal digits."""
    return _KEY.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Tell whether a text has the form of a name: 24 lower-case hexadecimal digits."""
    return _NAME.fullmatch(text) is not None


def is_variant(text: str) -> bool:
    """Tell whether a text names a variant, such as `1080.jpg`."""
    return _VARIANT.fullmatch(text) is not None


class DamagedBlobError(Exception):
    """The bytes of a picture are not what was stored; restore its volume or object from a copy."""


class StoreUnavailableError(OSError):
    """The store cannot be reached, or refuses; nothing was stored or removed for certain."""


class BlobStore(Protocol):
    """Keeps the variants of a picture under one key; what is stored never changes.

    Every backend promises: when `put` returns, all variants survive a crash; before that, none
    need be there, and nobody knows their key. A key nobody put, deleted, or malformed reads as
    None. What is read is what was put, or an error.
    """

    async def put(self, name: str, variants: Mapping[str, bytes]) -> str:
        """Store all variants of one picture, or nothing.

        Args:
            name: 24 lower-case hexadecimal digits, hard to guess; the end of the key. The same
                again may be given another key.
            variants: bytes by name, such as `1080.jpg`.

        Returns:
            The key: 8 digits that say where the picture is, then the name.

        Raises:
            ValueError: a name is malformed, or a variant too large for the backend.
            OSError: it could not be stored, as when the disk is full; nothing was.
        """

    async def get(self, key: str, variant: str) -> bytes | None:
        """Return one variant, or None when it is not there.

        Raises:
            DamagedBlobError: it is there, but the disk does not return what was stored.
        """

    async def delete(self, key: str) -> None:
        """Remove all variants; when this returns, no process serves them any more.

        Removing what is not there is no error.
        """

    def iterate_keys(self) -> AsyncIterator[str]:
        """Iterate over the keys of everything stored, in no order; a key may come twice."""

    async def close(self) -> None:
        """Let go of files and connections; idempotent."""
