"""The whole service with a role for each duty: migrated, served and relayed by nobody in charge."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.settings import Settings
from app.workers import relay_of
from shardkit import Cluster
from shardkit.config import load
from shardkit.ops import migrate, rolesrun
from shardkit.testing import wait_until
from tests.fixtures import pictures
from tests.fixtures.roled import give_roles
from tests.fixtures.servers import NewCluster
from tests.fixtures.service import PASSWORD, serving

pytestmark = pytest.mark.integration


def test_the_service_runs_with_a_role_for_each_duty(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    shape = {"physical": 2, "replicas": 0, "logical_shards": 4, "pgbouncer": False}
    with new_cluster(**shape, redis=False, memcached=False) as local:
        give_roles(local.config_path)
        _, topology = load(local.config_path)
        assert [(part.error, part.left) for part in rolesrun.apply(topology)] == [(None, ())] * 2
        outcome = migrate.apply(
            topology,
            migrate.load_revisions("app:migrations", folder=Path()),
            rules=migrate.load_rules("app.tables:Base"),
            cached=migrate.load_cached("app.tables:Base"),
        )
        assert outcome.error is None
        assert [part.changes for part in rolesrun.plan(topology)] == [(), ()]
        settings = Settings(config=local.config_path, media=tmp_path / "media")
        with (
            Cluster.from_file(local.config_path) as cluster,
            relay_of(cluster),
            serving(settings) as running,
            running.client() as ana,
            running.client() as ben,
        ):
            for name, client in (("ana", ana), ("ben", ben)):
                person = {"username": name, "password": PASSWORD}
                assert client.post("/api/v1/users", json=person).status_code == 201
            photo = ana.post("/api/v1/photos", files={"file": ("a.jpg", pictures.jpeg())})
            assert photo.status_code == 201, photo.text
            assert ben.put("/api/v1/users/ana/follow").status_code == 204
            here = f"/api/v1/photos/{photo.json()['id']}"
            assert ben.put(f"{here}/like").json()["like_count"] == 1
            assert ben.post(f"{here}/comments", json={"body": "light"}).status_code == 201
            assert len(ben.get("/api/v1/feed").json()["items"]) == 1
            wait_until(
                lambda: len(ana.get("/api/v1/users/ana/followers").json()["items"]) == 1,
                60.0,
                "the relay adds the other edge",
            )
            assert ana.delete(here).status_code == 204
