"""The seam between the photo service and whatever keeps the bytes of pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

__all__ = ["BlobStore", "is_blob_key"]

_KEY = re.compile(r"[0-9a-f]{32}")


def is_blob_key(text: str) -> bool:
    """Tell whether a text has the form of a blob key: 32 lower-case hexadecimal digits."""
    return _KEY.fullmatch(text) is not None


class BlobStore(Protocol):
    """Keeps the sizes of a picture under one key; what is stored never changes.

    Every backend promises: when `put` returns, all sizes survive a crash; before that, none
    need be there. A key nobody put, deleted, or malformed reads as None.
    """

    async def put(self, key: str, sizes: Mapping[int, bytes]) -> None:
        """Store all sizes of one picture, or nothing.

        Args:
            key: 32 lower-case hexadecimal digits, new; putting the same again is allowed.
            sizes: bytes by size in pixels.
        """

    async def get(self, key: str, size: int) -> bytes | None:
        """Return one size, or None when it is not there."""

    async def delete(self, key: str) -> None:
        """Remove all sizes; removing what is not there is no error."""
