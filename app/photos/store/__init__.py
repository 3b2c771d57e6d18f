"""Where the bytes of pictures live: the `BlobStore` protocol and its backends."""

from app.photos.store.files import FileBlobStore
from app.photos.store.protocol import BlobStore

__all__ = ["BlobStore", "FileBlobStore"]
