"""The service, really served: uvicorn on a free port over an embedded cluster."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

from app.__main__ import listen
from app.main import create_app
from app.settings import Settings
from shardkit.config import load
from shardkit.local import LocalCluster, LocalOptions
from shardkit.ops import migrate


@pytest.fixture(scope="session")
def app_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two physical shards with a replica each, migrated to the service's newest tables."""
    options = LocalOptions(
        physical=2, replicas=1, logical_shards=8, memcached=False, pgbouncer=False, fsync=False
    )
    with LocalCluster(tmp_path_factory.mktemp("cluster"), options) as local:
        _, topology = load(local.config_path)
        outcome = migrate.apply(topology, migrate.load_revisions("app:migrations", folder=Path()))
        assert outcome.error is None
        yield local


@dataclass(frozen=True)
class Service:
    """A running server.

    Attributes:
        url: where it listens.
        settings: how it was started.
    """

    url: str
    settings: Settings

    def client(self) -> httpx.Client:
        """Return a client with cookies of its own, as one browser."""
        return httpx.Client(base_url=self.url, timeout=20)


@pytest.fixture(scope="session")
def service(
    app_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    settings = Settings(
        config=app_cluster.config_path,
        media=tmp_path_factory.mktemp("media"),
        max_upload_bytes=2 * 1024 * 1024,
    )
    with serving(settings) as running:
        yield running


class _Server(uvicorn.Server):
    """A server that says when it has started, or failed to."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_tried = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self.has_tried.set()


class serving:  # noqa: N801 - used as a statement
    """Run the service in a thread for the time of a `with` block."""

    def __init__(self, settings: Settings) -> None:
        self._listener = listen("127.0.0.1", 0)
        port = self._listener.getsockname()[1]
        self._settings = settings
        self._url = f"http://127.0.0.1:{port}"
        config = uvicorn.Config(
            create_app(settings), log_level="warning", server_header=False, lifespan="on"
        )
        self._server = _Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}, name="uvicorn"
        )

    def __enter__(self) -> Service:
        self._thread.start()
        assert self._server.has_tried.wait(20), "the server does not start"
        assert self._server.started, "the server ended while starting"
        return Service(self._url, self._settings)

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()


@dataclass
class Person:
    """Somebody who signed up, with a client that is logged in.

    Attributes:
        username: the canonical name.
        id: the user id, as text.
        http: the client.
    """

    username: str
    id: str
    http: httpx.Client

    def upload(self, data: bytes, caption: str = "", name: str = "photo.jpg") -> httpx.Response:
        """Send a file to the API."""
        return self.http.post(
            "/api/v1/photos", files={"file": (name, data)}, data={"caption": caption}
        )


PASSWORD = "a long enough sentence"


@pytest.fixture
def join(service: Service) -> Iterator[Callable[[str], Person]]:
    """Sign somebody up; a number is added so that names are new in every test."""
    clients: list[httpx.Client] = []

    def sign_up(name: str) -> Person:
        client = service.client()
        clients.append(client)
        username = f"{name}{next(_numbers)}"
        answer = client.post("/api/v1/users", json={"username": username, "password": PASSWORD})
        assert answer.status_code == 201, answer.text
        return Person(username, answer.json()["user"]["id"], client)

    yield sign_up
    for client in clients:
        client.close()


_numbers = iter(range(1, 1_000_000))
