"""Makes the file of an export: a ZIP with what every table has of a person, and their pictures.

Handler of the relay, see `app.workers`. Tables are found by their models (`app.leaving.traces`), so
what is new is in it. Secrets are not, nor is anything of others but what they did to this person.
Done again, it makes the file again; a reader sees a whole one or none.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from sqlalchemy import inspect, select, update

from app.accounts.models import User
from app.database import TIMEOUT
from app.leaving.files import clear_old, path_of, written
from app.leaving.models import Export
from app.leaving.service import LIFE
from app.leaving.traces import SECRETS, Trace, traces
from app.photos.opening import open_blobs
from app.settings import Settings
from shardkit import Cluster, all_shards, deadline
from shardkit.outbox import Event

__all__ = ["NoFolderError", "make"]

LARGEST: Final = "1080.jpg"

README: Final = """What this service keeps of you, as of {now}.

tables/*.json   rows that are yours, by table; ids are text
pictures/*.jpg  your pictures in their largest size, by the id of the photo
"""


class NoFolderError(Exception):
    """This relay was given no settings, so it knows of no folder; another one makes the file."""


def make(cluster: Cluster, settings: Settings | None, event: Event) -> None:
    """Make the file of an export.

    Raises:
        NoFolderError: there is no folder for it (retryable, by another relay).
        UnavailableError: a server does not answer (retryable).
        GatherError: several do not (retryable).
        OSError: pictures cannot be read, or the file not be written (retryable).
    """
    if settings is None:
        raise NoFolderError
    export_id, user_id = int(event.payload["id"]), int(event.payload["user_id"])
    with deadline(TIMEOUT), cluster.writer() as session:
        export = session.get(Export, export_id)
        if export is None or export.n_bytes is not None or session.get(User, user_id) is None:
            return
    folder = settings.exports_folder
    path = path_of(folder, export_id)
    with written(path) as draft:
        _write(cluster, settings, draft, user_id)
        n_bytes = draft.stat().st_size
    clear_old(folder, LIFE.total_seconds())
    with deadline(TIMEOUT), cluster.writer() as session:
        if session.get(User, user_id, with_for_update={"read": True}) is None:
            path.unlink(missing_ok=True)  # the account ended meanwhile
            return
        statement = update(Export).where(Export.user_id == user_id, Export.id == export_id)
        session.execute(statement.values(n_bytes=n_bytes))
        session.commit()


def _write(cluster: Cluster, settings: Settings, draft: Path, user_id: int) -> None:
    pictures: list[tuple[int, str]] = []
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        archive.writestr("README.txt", README.format(now=now))
        for trace in traces():
            rows = list(_rows(cluster, trace, user_id))
            name = f"tables/{trace.entity.__tablename__}.json"
            archive.writestr(name, json.dumps(rows, indent=1, default=_text))
            if trace.blob is not None:
                pictures += _pictures(cluster, trace, user_id)
        asyncio.run(_copy(settings, archive, pictures))


def _rows(cluster: Cluster, trace: Trace, user_id: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table that are a person's, without secrets."""
    mapper = inspect(trace.entity)
    names = [column.key for column in mapper.column_attrs if column.key not in SECRETS]
    columns = [getattr(trace.entity, name) for name in names]
    keys = [getattr(trace.entity, mapper.get_property_by_column(c).key) for c in mapper.primary_key]
    if (is_own := trace.own(user_id)) is None:
        return
    statement = select(*columns).where(is_own).order_by(*keys).options(all_shards())
    with deadline(TIMEOUT), cluster.reader() as session:
        for row in session.execute(statement):
            yield {
                name: str(value) if type(value) is int and value >= 1 << 31 else value
                for name, value in zip(names, row, strict=True)
            }


def _pictures(cluster: Cluster, trace: Trace, user_id: int) -> Sequence[tuple[int, str]]:
    statement = select(trace.entity.id, trace.blob).where(trace.of(user_id)).options(all_shards())
    with deadline(TIMEOUT), cluster.reader() as session:
        return [(row[0], row[1]) for row in session.execute(statement)]


async def _copy(
    settings: Settings, archive: zipfile.ZipFile, pictures: Sequence[tuple[int, str]]
) -> None:
    blobs = open_blobs(settings)
    try:
        for row_id, key in pictures:
            data = await blobs.get(key, LARGEST)
            if data is not None:  # JPEG does not get smaller
                name = zipfile.ZipInfo(f"pictures/{row_id}.jpg")
                archive.writestr(name, data, zipfile.ZIP_STORED)
    finally:
        await blobs.close()


def _text(value: object) -> str:
    return value.isoformat() if isinstance(value, dt.datetime) else str(value)
