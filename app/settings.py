"""What the operator may set: arguments of `python -m app` first, then `APP_…` variables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from app.database import TIMEOUT
from app.limits.rates import Group, Rate, RateText

__all__ = ["Settings"]

PREFIX = "APP_"
_ORIGIN = r"https?://[a-z0-9.-]+(:[0-9]{1,5})?"
ORIGINS = rf"^({_ORIGIN}(,{_ORIGIN})*)?$"
"""Origins as browsers send them, with commas between."""


class Settings(BaseModel):
    """Settings of one server process; durations in seconds.

    Attributes:
        config: the `shardkit.toml` of the cluster.
        host: address to listen on.
        port: port to listen on; taken ones make the server try the next.
        media: folder of the pictures; by default beside the configuration file.
        blobs: what keeps them: `volumes` and `files` in that folder, or `s3`.
        volume_bytes: length at which a volume is sealed; at most 128 GiB.
        s3_bucket: the bucket, which must be there.
        s3_prefix: what the names of objects begin with.
        s3_endpoint: address of a server that speaks S3; without it, Amazon's. Credentials are
            taken from `AWS_ACCESS_KEY_ID` and its kin.
        webp: whether pictures are made as WebP too, at the cost of half as much time again.
        upload_patience: an upload that takes longer is answered with 202 and the address of
            its status.
        upload_lifetime: an upload that takes longer than this has failed.
        max_upload_bytes: size of one uploaded file.
        max_body_bytes: size of any other request.
        body_timeout: until a request must have arrived whole.
        max_pixels: width times height of an upload.
        image_workers: decoding processes.
        hash_workers: passwords hashed at the same time; each takes 46 MiB.
        session_idle: a log-in unused for so long ends.
        session_absolute: a log-in older than this ends.
        fresh_reads: how long after a write a client's reads see it for certain.
        max_followees: people one account may follow.
        database_timeout: until the reads or the writes of one step must have ended.
        exports: folder for the files of exports, shared by servers and relays; by default beside
            the pictures.
        erasure_grace: how long after the end of an account a request may still write; then a
            second pass looks for what it has written.
        cors_origins: sites whose pages may use the API with a bearer, separated by commas, such as
            `https://photos.example`.
        limit_sign_ups: new accounts from one address, as requests/seconds; `off` for no limit.
        limit_log_ins: log-ins and other uses of passwords from one address.
        limit_log_in_failures: wrong passwords for one name, from anywhere.
        limit_heavy: uploads and exports from one address.
        limit_writes: other requests that change something from one address.
        limit_reads: requests that read, but for pictures, from one address.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: Path = Path("shardkit.toml")
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    media: Path | None = None
    blobs: Literal["volumes", "files", "s3"] = "volumes"
    volume_bytes: Annotated[int, Field(ge=1 << 20, le=128 << 30)] = 8 << 30
    s3_bucket: str = "pictures"
    s3_prefix: str = ""
    s3_endpoint: str | None = None
    webp: bool = True
    upload_patience: Annotated[float, Field(ge=0)] = 3.0
    upload_lifetime: Annotated[float, Field(gt=0)] = 300.0
    max_upload_bytes: Annotated[int, Field(gt=0)] = 10 * 1024 * 1024
    max_body_bytes: Annotated[int, Field(gt=0)] = 64 * 1024
    body_timeout: Annotated[float, Field(gt=0)] = 60.0
    max_pixels: Annotated[int, Field(gt=0)] = 40_000_000
    image_workers: Annotated[int, Field(ge=1, le=64)] = 1
    hash_workers: Annotated[int, Field(ge=1, le=64)] = 2
    session_idle: Annotated[float, Field(gt=0)] = 14 * 86_400.0
    session_absolute: Annotated[float, Field(gt=0)] = 90 * 86_400.0
    fresh_reads: Annotated[float, Field(gt=0)] = 60.0
    max_followees: Annotated[int, Field(gt=0)] = 5000
    database_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = TIMEOUT
    exports: Path | None = None
    erasure_grace: Annotated[float, Field(ge=0)] = 30.0
    cors_origins: Annotated[str, Field(pattern=ORIGINS)] = ""
    limit_sign_ups: RateText = Rate(100, 3600)
    limit_log_ins: RateText = Rate(60, 300)
    limit_log_in_failures: RateText = Rate(10, 900)
    limit_heavy: RateText = Rate(100, 600)
    limit_writes: RateText = Rate(600, 120)
    limit_reads: RateText = Rate(3000, 120)

    @classmethod
    def read(cls, environment: Mapping[str, str], **given: object) -> Self:
        """Return the settings of the environment, overridden by what was given and not None."""
        named = {
            name: environment[PREFIX + name.upper()]
            for name in cls.model_fields
            if PREFIX + name.upper() in environment
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        return cls.model_validate({**named, **chosen})

    @property
    def origins(self) -> frozenset[str]:
        """Sites whose pages may use the API with a bearer."""
        return frozenset(filter(None, self.cors_origins.split(",")))

    @property
    def exports_folder(self) -> Path:
        """Where the files of exports are."""
        return self.exports or self.media_folder / "exports"

    @property
    def limits(self) -> Mapping[Group, Rate | None]:
        """How often who may ask, by group."""
        return {
            "sign_ups": self.limit_sign_ups,
            "log_ins": self.limit_log_ins,
            "log_in_failures": self.limit_log_in_failures,
            "heavy": self.limit_heavy,
            "writes": self.limit_writes,
            "reads": self.limit_reads,
        }

    @property
    def media_folder(self) -> Path:
        """Where the pictures live."""
        return self.media or self.config.parent / "media"
