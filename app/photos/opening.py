"""Opens the blob store that the settings ask for."""

from __future__ import annotations

from app.photos.images import VARIANTS
from app.photos.store import BlobStore, FileBlobStore, S3BlobStore, VolumeBlobStore
from app.settings import Settings

__all__ = ["open_blobs"]


def open_blobs(settings: Settings) -> BlobStore:
    """Return the store; it reaches for nothing before it is used, and its user closes it."""
    match settings.blobs:
        case "files":
            return FileBlobStore(settings.media_folder)
        case "s3":
            return S3BlobStore(settings.s3_bucket, settings.s3_prefix, settings.s3_endpoint)
        case "volumes":
            return VolumeBlobStore(
                settings.media_folder, VARIANTS, volume_bytes=settings.volume_bytes
            )
