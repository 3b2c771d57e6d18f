"""Uploads over HTTP: at once or later, with a reason when they fail; what is left of deleted ones."""

from __future__ import annotations

import asyncio
import datetime as dt
import errno
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from app.clock import utc_now
from app.photos.__main__ import cli
from app.photos.models import Upload
from app.photos.opening import open_blobs
from app.photos.store import VolumeBlobStore
from app.photos.store.needle import UNIT, Address, alternate_of
from app.photos.store.volume import Volume
from app.photos.sweep import Swept, sweep
from shardkit import Cluster
from shardkit.testing import wait_until
from tests.fixtures import pictures
from tests.fixtures.blobs import keys_in
from tests.fixtures.service import Person, Service

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]
ASYNC = {"prefer": "respond-async"}


def begin(person: Person, data: bytes) -> dict[str, Any]:
    answer = person.http.post("/api/v1/photos", files={"file": ("x", data)}, headers=ASYNC)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/api/v1/uploads/{answer.json()['id']}"
    assert answer.headers["retry-after"] == "1"
    found: dict[str, Any] = answer.json()
    assert found["state"] == "working"
    return found


def finished(person: Person, upload_id: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def is_over() -> bool:
        found.update(person.http.get(f"/api/v1/uploads/{upload_id}").raise_for_status().json())
        return bool(found["state"] != "working")

    wait_until(is_over, 30.0, "the upload is done or has failed")
    return found


def test_pictures_are_for_ever_and_known_by_their_tag(join: Join) -> None:
    ana = join("ana")
    photo = ana.upload(pictures.jpeg(300, 200)).json()
    for images, kind in ((photo["images"], "image/jpeg"), (photo["images_webp"], "image/webp")):
        assert set(images) == {"1080", "640", "320", "150"}
        for path in images.values():
            answer = ana.http.get(path)
            assert answer.headers["content-type"] == kind
            assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
            again = ana.http.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == answer.headers["etag"]
            other = ana.http.get(path, headers={"if-none-match": '"another"'})
            assert other.content == answer.content
    assert len(photo["images_webp"]) == 4


def test_an_upload_that_takes_its_time_becomes_a_photo(join: Join) -> None:
    ana, ben = join("ana"), join("ben")
    upload = begin(ana, pictures.jpeg(300, 200))
    found = finished(ana, upload["id"])
    assert (found["state"], found["problem"]) == ("done", None)
    assert ana.http.get(f"/api/v1/photos/{found['photo_id']}").json()["width"] == 300
    assert ana.http.get(f"/uploads/{upload['id']}").headers["location"] == f"/p/{found['photo_id']}"
    for path in (f"/api/v1/uploads/{upload['id']}", f"/uploads/{upload['id']}"):
        assert ben.http.get(path).status_code == 404
    assert ana.http.get("/api/v1/uploads/123").status_code == 404


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"not a picture", "unsupported-image"),
        (pictures.jpeg()[:-4000], "damaged-image"),
        (pictures.bomb_png(), "too-many-pixels"),
    ],
    ids=["text", "cut", "bomb"],
)
def test_an_upload_that_fails_later_says_why(
    join: Join, service: Service, data: bytes, kind: str
) -> None:
    ana = join("ana")
    before = keys_in(service)
    upload = begin(ana, data)
    found = finished(ana, upload["id"])
    assert (found["state"], found["photo_id"]) == ("failed", None)
    assert found["problem"]["type"] == f"urn:shardkit-app:problem:{kind}"
    page = ana.http.get(f"/uploads/{upload['id']}")
    assert page.status_code == 200
    assert found["problem"]["detail"] in page.text
    assert "refresh" not in page.headers
    assert keys_in(service) == before


def test_an_upload_whose_server_died_is_interrupted(join: Join, service: Service) -> None:
    ana = join("ana")
    now = utc_now()
    with Cluster.from_file(service.settings.config) as cluster, cluster.writer() as session:
        uploads = [
            Upload(owner_id=int(ana.id), created_at=now, expires_at=now + dt.timedelta(seconds=s))
            for s in (0, 600)
        ]
        session.add_all(uploads)
        session.commit()
        over, working = (upload.id for upload in uploads)
    found = ana.http.get(f"/api/v1/uploads/{over}").json()
    assert found["state"] == "failed"
    assert found["problem"]["type"].endswith("upload-interrupted")
    page = ana.http.get(f"/uploads/{working}")
    assert page.headers["refresh"] == "2"
    assert "on its way" in page.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_refuses_an_upload_and_shows_nothing(
    join: Join, service: Service, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    ana = join("ana")
    before = keys_in(service)

    def fail(*_: Any) -> None:
        raise OSError(number, "as if")

    with monkeypatch.context() as broken:
        broken.setattr("app.photos.store.volume.write_at", fail)
        answer = ana.upload(pictures.jpeg(64, 64))
        expected = {errno.ENOSPC: (507, "storage-full"), errno.EIO: (503, "storage-unavailable")}
        status, kind = expected[number]
        assert answer.status_code == status
        assert answer.json()["type"] == f"urn:shardkit-app:problem:{kind}"
        failed = finished(ana, begin(ana, pictures.jpeg(64, 64))["id"])
        assert failed["problem"]["type"] == f"urn:shardkit-app:problem:{kind}"
    assert ana.http.get(f"/api/v1/users/{ana.username}/photos").json()["items"] == []
    assert keys_in(service) == before
    assert ana.upload(pictures.jpeg(64, 64)).status_code == 201


def test_a_damaged_picture_is_an_error_and_not_a_wrong_picture(
    join: Join, service: Service
) -> None:
    ana = join("ana")
    photo = ana.upload(pictures.jpeg(64, 64)).json()
    path = photo["images"]["640"]
    place = Address.parse(path.split("/")[2])
    volume = Volume(service.settings.media_folder, place.volume)
    found = volume.find(place.key)
    assert found is not None
    state, entry = found
    offset, _ = entry.at(state.super.alternates.index(alternate_of("640.jpg")))
    with volume.path.open("r+b") as file:
        file.seek(offset * UNIT + 200)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes((byte ^ 0x20,)))
    answer = ana.http.get(path)
    assert answer.status_code == 500
    assert answer.json()["type"] == "urn:shardkit-app:problem:damaged-picture"
    ana.http.delete(f"/api/v1/photos/{photo['id']}").raise_for_status()


def test_the_relay_removes_what_a_process_that_died_has_left(
    join: Join, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    ana = join("ana")
    before = keys_in(service)
    photo = ana.upload(pictures.jpeg(64, 64)).json()
    original = VolumeBlobStore.delete
    failed: list[str] = []

    async def fail_once(self: VolumeBlobStore, key: str) -> None:
        if not failed:
            failed.append(key)
            raise OSError(errno.EIO, "as if")
        await original(self, key)

    monkeypatch.setattr(VolumeBlobStore, "delete", fail_once)
    assert ana.http.delete(f"/api/v1/photos/{photo['id']}").status_code == 204
    wait_until(lambda: keys_in(service) == before, 20.0, "the relay has removed the bytes")
    assert failed
    for path in (*photo["images"].values(), *photo["images_webp"].values()):
        assert ana.http.get(path).status_code == 404


def swept(service: Service, now: dt.datetime, *, dry_run: bool = False) -> Swept:
    async def run(cluster: Cluster) -> Swept:
        blobs = open_blobs(service.settings)
        notes = service.settings.media_folder / "orphans.json"
        grace = dt.timedelta(hours=1)
        found = await sweep(cluster, blobs, notes, now, grace=grace, dry_run=dry_run)
        await blobs.close()
        return found

    with Cluster.from_file(service.settings.config) as cluster:
        return asyncio.run(run(cluster))


def test_a_sweep_removes_orphans_at_the_second_sight(join: Join, service: Service) -> None:
    ana = join("ana")
    photo = ana.upload(pictures.jpeg(64, 64)).json()
    now = utc_now()
    swept(service, now)  # what other tests have left is seen a first time
    swept(service, now + dt.timedelta(hours=2))
    before = keys_in(service)

    async def store() -> str:
        blobs = open_blobs(service.settings)
        key = await blobs.put("a" * 24, {"150.jpg": b"nobody's"})
        await blobs.close()
        return key

    orphan = asyncio.run(store())
    later = now + dt.timedelta(hours=3)
    assert keys_in(service) == before | {orphan}
    first = swept(service, later)
    assert (first.orphans, first.removed) == (1, 0)
    assert swept(service, later + dt.timedelta(minutes=59)).removed == 0
    assert swept(service, later + dt.timedelta(hours=1), dry_run=True).removed == 0
    assert keys_in(service) == before | {orphan}
    last = swept(service, later + dt.timedelta(hours=1))
    assert (last.orphans, last.removed) == (0, 1)
    assert keys_in(service) == before
    assert ana.http.get(photo["images"]["640"]).status_code == 200


def operate(service: Service, *arguments: str) -> tuple[int, Any]:
    where = {"APP_MEDIA": str(service.settings.media_folder)}
    config = ("--config", str(service.settings.config), "--json")
    done = CliRunner().invoke(cli, [*arguments, *config], env=where)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, json.loads(done.stdout) if done.stdout else done.stderr


def test_operators_see_scrub_compact_and_sweep(join: Join, service: Service) -> None:
    ana = join("ana")
    photos = [ana.upload(pictures.jpeg(64, 64)).json() for _ in range(2)]
    ana.http.delete(f"/api/v1/photos/{photos[0]['id']}").raise_for_status()
    code, found = operate(service, "stats")
    assert code == 0
    assert {"volume", "bytes", "dead_bytes", "uploads", "images", "is_claimed"} <= found[0].keys()
    assert operate(service, "scrub")[0] == 0
    assert operate(service, "scrub", "999")[0] == 2
    claimed = [each["volume"] for each in found if each["is_claimed"]]
    assert claimed, "the service appends to one"
    code, found = operate(service, "compact", "--dead", "0")
    assert code == 0
    assert "in use, sealed" in [each["state"] for each in found]
    photos.append(ana.upload(pictures.jpeg(64, 64)).json())  # goes to another volume
    code, found = operate(service, "compact", *map(str, claimed), "--dead", "0")
    assert (code, [each["state"] for each in found]) == (0, ["compacted"] * len(claimed))
    assert all(each["freed_bytes"] > 0 for each in found)
    for photo in photos[1:]:
        assert ana.http.get(photo["images"]["1080"]).status_code == 200
    assert ana.http.get(photos[0]["images"]["1080"]).status_code == 404
    _, (found,) = operate(service, "sweep", "--dry-run")
    assert set(found["missing"]) <= {"x"}, "rows that other tests have written past the service"
