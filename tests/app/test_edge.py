"""The nginx configuration of the containers, run before the service: what it keeps, for whom."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from shardkit.testing import wait_until
from tests.fixtures import pictures
from tests.fixtures.service import Person, Service

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed"),
]

CONFIG = Path(__file__).parents[2] / "docker/nginx/nginx.conf"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def edge(service: Service, tmp_path: Path) -> Iterator[str]:
    """The address of nginx in front of the service; names and places of containers are replaced."""
    port = free_port()
    text = CONFIG.read_text("utf-8")
    for there, here in (
        ("http://app:8000", service.url),
        ("/tmp/", f"{tmp_path}/"),
        ("listen 8080", f"listen 127.0.0.1:{port}"),
        ("/dev/stdout", str(tmp_path / "access.log")),
    ):
        assert there in text
        text = text.replace(there, here)
    written = tmp_path / "nginx.conf"
    written.write_text(text, "utf-8")
    tmp_path.chmod(0o777)  # its workers are nobody when root starts it
    process = subprocess.Popen(["nginx", "-e", "stderr", "-c", str(written)])
    try:
        wait_until(lambda: answers(port), 20.0, "nginx answers")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/nginx").status_code == 204
    except httpx.HTTPError:
        return False


def test_pictures_are_kept_at_the_edge(edge: str, join: Callable[[str], Person]) -> None:
    ana = join("ana")
    photo = ana.upload(pictures.jpeg(300, 200)).json()
    path = photo["images"]["640"]
    with httpx.Client(base_url=edge, timeout=20) as client:
        first, second = client.get(path), client.get(path)
        assert [each.headers["x-cache"] for each in (first, second)] == ["MISS", "HIT"]
        direct = ana.http.get(path)
        for each in (first, second):
            assert each.content == direct.content
            for name in ("etag", "cache-control", "content-type", "content-security-policy"):
                assert each.headers[name] == direct.headers[name]
            assert "x-accel-expires" not in each.headers
            assert "set-cookie" not in each.headers
        known = client.get(path, headers={"if-none-match": first.headers["etag"]})
        assert (known.status_code, known.content) == (304, b"")
        # What names nothing is not kept, and pages are not either.
        for missing in (f"/media/{'0' * 32}/640.jpg", path.replace("640", "641")):
            assert [client.get(missing).status_code for _ in range(2)] == [404, 404]
        page = client.get(f"/u/{ana.username}")
        assert page.status_code == 200
        assert "x-cache" not in page.headers
        assert client.get("/metrics").status_code == 404
