"""A blob store in a bucket of S3 or of a server that speaks its protocol: one object per variant.

    ab/…abcd/1080.jpg     the last two digits, the key, the variant

The variants of a picture are not stored at one moment: they are all there when `put` returns, and
nobody knows the key before. Objects carry their media type, so that a content delivery network
may serve the bucket itself. Credentials come from the usual variables, `AWS_ACCESS_KEY_ID` and
so on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from obstore.exceptions import BaseError
from obstore.store import S3Store

from app.photos.store.protocol import (
    MEDIA_TYPES,
    StoreUnavailableError,
    is_blob_key,
    is_name,
    is_variant,
)

__all__ = ["S3BlobStore"]

PREFIX = "00000000"
"""Where the key of a needle names its volume."""

FOREVER = "public, max-age=31536000, immutable"


class S3BlobStore:
    """Keeps pictures as objects.

    Args:
        bucket: name of the bucket, which must be there.
        prefix: what all names begin with; may be empty.
        endpoint: address of the server; None is Amazon's.
    """

    def __init__(self, bucket: str, prefix: str = "", endpoint: str | None = None) -> None:
        options: dict[str, Any] = {"client_options": {"timeout": "10s"}}
        if endpoint is not None:
            options["endpoint"] = endpoint
            options["client_options"]["allow_http"] = endpoint.startswith("http://")
        self._store = S3Store(bucket, prefix=prefix or None, **options)

    async def put(self, name: str, variants: Mapping[str, bytes]) -> str:
        """Store all variants of one picture, or nothing; see `BlobStore.put`."""
        if not is_name(name) or not all(map(is_variant, variants)) or not variants:
            raise ValueError(f"{name!r} with {list(variants)} cannot be stored")
        key = PREFIX + name
        try:
            async with asyncio.TaskGroup() as group:
                for variant, data in variants.items():
                    group.create_task(self._put(f"{_folder(key)}/{variant}", variant, data))
        except BaseException as error:
            with contextlib.suppress(StoreUnavailableError):
                await self.delete(key)
            if isinstance(error, BaseExceptionGroup):
                raise StoreUnavailableError(f"S3: {error.exceptions[0]}") from error
            raise
        return key

    async def get(self, key: str, variant: str) -> bytes | None:
        """Return one variant, or None when it is not there."""
        if not is_blob_key(key) or not is_variant(variant):
            return None
        try:
            found = await self._store.get_async(f"{_folder(key)}/{variant}")
            return bytes(await found.bytes_async())
        except FileNotFoundError:
            return None
        except BaseError as error:
            raise StoreUnavailableError(f"S3: {error}") from error

    async def delete(self, key: str) -> None:
        """Remove all variants; removing what is not there is no error."""
        if not is_blob_key(key):
            return
        try:
            paths = [path async for path in self._paths(_folder(key))]
            if paths:
                await self._store.delete_async(paths)
        except FileNotFoundError:
            return
        except BaseError as error:
            raise StoreUnavailableError(f"S3: {error}") from error

    async def iterate_keys(self) -> AsyncIterator[str]:
        """Iterate over the keys of everything stored."""
        last = ""
        async for path in self._paths(None):
            key = path.split("/")[-2]
            if key != last and is_blob_key(key):
                yield key
                last = key

    async def close(self) -> None:
        """Connections close by themselves when they are idle."""

    async def _put(self, path: str, variant: str, data: bytes) -> None:
        media_type = MEDIA_TYPES[variant.partition(".")[2]]
        await self._store.put_async(
            path, data, attributes={"Content-Type": media_type, "Cache-Control": FOREVER}
        )

    async def _paths(self, prefix: str | None) -> AsyncIterator[str]:
        async for page in self._store.list(prefix):
            for found in page:
                yield found["path"]


def _folder(key: str) -> str:
    return f"{key[-2:]}/{key}"
