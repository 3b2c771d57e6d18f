"""Where the bytes of pictures live: the `BlobStore` protocol and its backends."""

from app.photos.store.files import FileBlobStore
from app.photos.store.protocol import (
    MEDIA_TYPES,
    NAME_DIGITS,
    BlobStore,
    DamagedBlobError,
    StoreUnavailableError,
    is_variant,
)
from app.photos.store.s3 import S3BlobStore
from app.photos.store.volumes import VolumeBlobStore

__all__ = [
    "MEDIA_TYPES",
    "NAME_DIGITS",
    "BlobStore",
    "DamagedBlobError",
    "FileBlobStore",
    "S3BlobStore",
    "StoreUnavailableError",
    "VolumeBlobStore",
    "is_variant",
]
