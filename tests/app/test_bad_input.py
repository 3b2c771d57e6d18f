"""What people and programs send that they should not: refused with a reason, never a 500."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from app.settings import Settings
from tests.fixtures import pictures
from tests.fixtures.blobs import keys_in
from tests.fixtures.service import PASSWORD, Person, Service, serving

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]


def problem(answer: httpx.Response, status: int, kind: str | None = None) -> dict[str, Any]:
    """Check that an answer is a problem document and return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert body["detail"]
    assert body["request_id"] == answer.headers["x-request-id"]
    if kind is not None:
        assert body["type"] == f"urn:shardkit-app:problem:{kind}"
    for secret in ("Traceback", "SELECT", "psycopg", "127.0.0.1:", "shard_0"):
        assert secret not in answer.text
    return body


@pytest.mark.parametrize(
    ("data", "status", "kind"),
    [
        (b"", 422, "empty-upload"),
        (b"\xff", 415, "unsupported-image"),
        (b"not a picture at all", 415, "unsupported-image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported-image"),
        (pictures.bomb_png(), 422, "too-many-pixels"),
        (pictures.jpeg()[:-4000], 422, "damaged-image"),
        (bytes(3 << 20), 413, "body-too-large"),
        (bytes(40 << 20), 413, "body-too-large"),
    ],
    ids=[
        "0 bytes",
        "1 byte",
        "wrong magic",
        "svg",
        "30000 x 30000",
        "truncated",
        "over the limit",
        "far over the limit",
    ],
)
def test_upload_refused_and_nothing_stored(
    join: Join, service: Service, data: bytes, status: int, kind: str
) -> None:
    ana = join("ana")
    before = keys_in(service)

    try:
        answer = ana.upload(data, name="../../etc/passwd.jpg")
    except (httpx.WriteError, httpx.ReadError):
        assert len(data) > 16 << 20  # cut off while still sending, long past the limit
    else:
        problem(answer, status, kind)

    assert keys_in(service) == before
    grid = ana.http.get(f"/api/v1/users/{ana.username}/photos").json()
    assert grid["items"] == []


def test_upload_without_content_length_is_counted(join: Join) -> None:
    ana = join("ana")

    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
        for _ in range(48):
            yield bytes(64 << 10)

    answer = ana.http.post(
        "/api/v1/photos",
        content=endless(),
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    problem(answer, 413, "body-too-large")


@pytest.mark.parametrize(
    ("headers", "content"),
    [
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\nnonsense"),
        ({"content-type": "multipart/form-data"}, b"--x--"),
        ({"content-type": "application/json"}, b"{}"),
        ({"content-type": "text/plain"}, b"hello"),
        ({}, b""),
    ],
)
def test_upload_that_is_no_form(join: Join, headers: dict[str, str], content: bytes) -> None:
    answer = join("ana").http.post("/api/v1/photos", content=content, headers=headers)
    assert 400 <= answer.status_code < 500
    problem(answer, answer.status_code)


NOT_IDS = [
    "x", "-1", "1.5", "1e3", "0x10", "00", "+1", "%20", "%00", "9" * 19, "9" * 400,
    "18446744073709551616", "%D9%A1", "null", "'", "1;drop",
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_IDS)
def test_malformed_ids_name_nothing(join: Join, text: str) -> None:
    http = join("ana").http
    for verb, path in (
        ("GET", f"/api/v1/photos/{text}"),
        ("DELETE", f"/api/v1/photos/{text}"),
        ("PUT", f"/api/v1/photos/{text}/like"),
        ("GET", f"/api/v1/photos/{text}/comments"),
        ("DELETE", f"/api/v1/photos/1/comments/{text}"),
    ):
        problem(http.request(verb, path), 404)
    assert http.get(f"/p/{text}").status_code == 404


@pytest.mark.parametrize("number", [0, 1, 1023, 1 << 10, (1 << 63) - 1, 8191 << 10, 1 << 40])
def test_ids_of_nothing_are_not_found(join: Join, number: int) -> None:
    http = join("ana").http
    for verb, path in (
        ("GET", f"/api/v1/photos/{number}"),
        ("DELETE", f"/api/v1/photos/{number}"),
        ("PUT", f"/api/v1/photos/{number}/like"),
        ("DELETE", f"/api/v1/photos/{number}/like"),
        ("GET", f"/api/v1/photos/{number}/comments"),
        ("DELETE", f"/api/v1/photos/{number}/comments/{number}"),
    ):
        problem(http.request(verb, path), 404, "not-found")
    answer = http.post(f"/api/v1/photos/{number}/comments", json={"body": "hello"})
    problem(answer, 404, "not-found")
    page = http.get(f"/p/{number}")
    assert page.status_code == 404
    assert "text/html" in page.headers["content-type"]


@pytest.mark.parametrize("text", ["x", "-1", "1.0", "9" * 19, "9" * 4000, "", "\x00", "1 OR 1=1"])
def test_malformed_cursors_are_refused(join: Join, text: str) -> None:
    http = join("ana").http
    for path in ("/api/v1/feed", "/api/v1/explore"):
        problem(http.get(path, params={"cursor": text}), 422, "invalid-input")
    problem(http.get("/api/v1/me/requests", params={"cursor": f"{text}.."}), 422, "invalid-input")
    for path in ("/", "/explore"):
        assert http.get(path, params={"cursor": text}).status_code == 422


@pytest.mark.parametrize("number", [0, 1, (1 << 63) - 1, 8191 << 10])
def test_any_id_is_a_place_in_a_list(join: Join, number: int) -> None:
    ana = join("ana")
    assert ana.http.get("/api/v1/explore", params={"cursor": str(number)}).status_code == 200
    place = {"cursor": f"{number}.{number}"}
    for path in (f"users/{ana.username}/followers", "me/requests", "me/blocks"):
        assert ana.http.get(f"/api/v1/{path}", params=place).status_code == 200


@pytest.mark.parametrize("limit", ["0", "-1", "101", "1000000000", "x", "", "1.5"])
def test_limits_have_limits(join: Join, limit: str) -> None:
    problem(join("ana").http.get("/api/v1/feed", params={"limit": limit}), 422)


@pytest.mark.parametrize(
    "name",
    [
        "%00",
        "x",
        "a" * 31,
        "a" * 4000,
        "..%2f..%2fetc",
        "%F0%9F%98%80",
        "%ED%A0%80",
        "a'b",
        "%0d%0a",
    ],
)
def test_names_of_nobody(join: Join, name: str) -> None:
    http = join("ana").http
    problem(http.get(f"/api/v1/users/{name}"), 404)
    assert http.get(f"/u/{name}").status_code == 404
    assert http.put(f"/api/v1/users/{name}/follow").status_code == 404


BAD_TEXT = ["\x00", "a\x00b", "\u202eevil", "\x1b[31m"]


@pytest.mark.parametrize("text", [*BAD_TEXT, "", "   ", "x" * 1001])
def test_comments_that_cannot_be(join: Join, text: str) -> None:
    ana = join("ana")
    photo = ana.upload(pictures.jpeg(64, 64)).json()["id"]
    problem(ana.http.post(f"/api/v1/photos/{photo}/comments", json={"body": text}), 422)
    page = ana.http.post(f"/p/{photo}/comments", data={"body": text})
    assert page.status_code == 422
    assert ana.http.get(f"/api/v1/photos/{photo}").json()["comment_count"] == 0


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"", "application/json", 422),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 422),
        (b"null", "application/json", 422),
        (b'"text"', "application/json", 422),
        (b'{"username": 1, "password": []}', "application/json", 422),
        (b'{"username": "\\ud800abc", "password": "long enough"}', "application/json", 422),
        (b'{"username": "fine", "password": "\\ud800\\ud800\\ud800"}', "application/json", 422),
        (b'{"username": "f.n", "password": "long enough", "is_admin": 1}', "application/json", 422),
        (b'{"username": "fine.name", "password": "short"}', "application/json", 422),
        (b'{"username": "admin", "password": "long enough"}', "application/json", 422),
        (b"\xff\xfe\x00", "application/json", 400),
        (b"[" * 30_000, "application/json", 400),
        (b'{"username": "fine.name", "password": "long enough"}', "text/plain", 422),
        (b"x" * (80 << 10), "application/json", 413),
    ],
)  # fmt: skip
def test_malformed_bodies(service: Service, content: bytes, content_type: str, status: int) -> None:
    with service.client() as client:
        answer = client.post(
            "/api/v1/users", content=content, headers={"content-type": content_type}
        )
    problem(answer, status)
    assert "long enough" not in answer.text


def test_passwords_are_bounded_not_cut(service: Service) -> None:
    with service.client() as client:
        for password in ("x" * 1025, "\u00e9" * 513, "x" * 60_000):
            answer = client.post(
                "/api/v1/users", json={"username": "never.made", "password": password}
            )
            problem(answer, 422, "invalid-input")


@pytest.mark.parametrize(
    "cookie",
    [
        "", ".", "x", "1.x", "1.", f"{(1 << 63) - 1}.x", "-1.x", "9" * 400, "x" * 8000,
        "\xff\xfe", f"{8191 << 10}.secret",
    ],
)  # fmt: skip
def test_forged_sessions_are_nobody(service: Service, cookie: str) -> None:
    with service.client() as client:
        raw = b"session=" + cookie.encode("latin-1")
        problem(client.get("/api/v1/me", headers={b"cookie": raw}), 401, "not-signed-in")
        bearer = (b"Bearer " + cookie.encode("latin-1")).strip()
        problem(client.get("/api/v1/me", headers={b"authorization": bearer}), 401)


def test_a_flipped_bit_in_a_session_is_nobody(join: Join, service: Service) -> None:
    token = join("ana").http.cookies["session"]
    last = "A" if token[-1] != "A" else "B"
    with service.client() as client:
        answer = client.get("/api/v1/me", headers={"cookie": f"session={token[:-1]}{last}"})
    problem(answer, 401)


@pytest.mark.parametrize(
    "token", ["", "x", "0", "1", "1~a.1.1.18.3~00000000", "1.x", "\xff", "a" * 5000]
)
def test_forged_freshness_tokens_are_harmless(join: Join, token: str) -> None:
    ana = join("ana")
    for name, value in {"x-shardkit-token": token, "cookie": f"shardkit-token={token}"}.items():
        answer = ana.http.get("/api/v1/feed", headers={name.encode(): value.encode("latin-1")})
        assert answer.status_code == (200 if name != "cookie" else 401)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://", "http://[", "x"])
def test_writes_from_other_sites_are_refused(join: Join, service: Service, origin: str) -> None:
    ana = join("ana")
    for path in ("/api/v1/sessions", "/logout", "/api/v1/photos"):
        answer = ana.http.post(path, headers={"origin": origin})
        assert answer.status_code == 403
    assert ana.http.post("/logout", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    answer = ana.http.patch("/api/v1/me", json={"bio": "x"}, headers={"origin": service.url})
    assert answer.status_code == 200


@pytest.mark.parametrize("verb", ["PUT", "PATCH", "TRACE", "BREW", "DELETE"])
def test_unknown_verbs(service: Service, verb: str) -> None:
    with service.client() as client:
        answer = client.request(verb, "/api/v1/feed")
    problem(answer, 405)
    assert answer.headers["allow"] == "GET"


@pytest.mark.parametrize(
    "path",
    [
        "/media/..%2f..%2fetc%2fpasswd/150.jpg",
        f"/media/{'0' * 32}/150.jpg",
        f"/media/{'0' * 32}/151.jpg",
        f"/media/{'0' * 32}/x.jpg",
        f"/media/{'Z' * 32}/150.jpg",
        "/api/v1/nothing",
        "/api/v2/feed",
    ],
)
def test_nothing_there(service: Service, path: str) -> None:
    with service.client() as client:
        problem(client.get(path), 404)


def test_static_files_stay_in_their_folder(service: Service) -> None:
    with service.client() as client:
        assert client.get("/static/style.css").status_code == 200
        for path in ("/static/../main.py", "/static/%2e%2e/pages.py", "/static/nothing.css"):
            assert client.get(path).status_code == 404


def test_pages_ask_strangers_to_log_in(service: Service) -> None:
    with service.client() as client:
        for path in ("/upload", "/settings"):
            answer = client.get(path)
            assert answer.status_code == 303
            assert answer.headers["location"] == f"/login?next={path}"
        answer = client.post("/p/1/like")
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=/")
        for goto in ("//evil.example", "https://evil.example", "/\\evil.example", "javascript:1"):
            assert "evil" not in client.get("/login", params={"next": goto}).text


def test_forms_say_what_is_wrong(join: Join, service: Service) -> None:
    ana = join("ana")
    with service.client() as client:
        answer = client.post("/signup", data={"username": "<b>x", "password": "short"})
        assert answer.status_code == 422
        assert "Password must have at least 8 characters." in answer.text
        assert "&lt;b&gt;x" in answer.text
        assert "<b>x" not in answer.text
        answer = client.post("/signup", data={"username": ana.username, "password": PASSWORD})
        assert answer.status_code == 409
        assert "taken" in answer.text
        answer = client.post("/login", data={"username": ana.username, "password": "wrong one"})
        assert answer.status_code == 401
        assert "The username or the password is wrong." in answer.text
    answer = ana.http.post("/upload", files={"file": ("x.jpg", b"nonsense")})
    assert answer.status_code == 415
    assert "not a JPEG, PNG or WebP" in answer.text
    answer = ana.http.post("/upload", files={"file": ("x.jpg", bytes(3 << 20))})
    assert answer.status_code == 413
    assert "larger than the 2 MiB allowed here" in answer.text
    assert "text/html" in answer.headers["content-type"]
    answer = ana.http.post("/upload", data={"caption": "no file"})
    assert answer.status_code == 422
    assert "Choose a photo first." in answer.text


def test_scripts_in_texts_stay_texts(join: Join) -> None:
    ana = join("ana")
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    ana.http.patch("/api/v1/me", json={"display_name": hostile[:60], "bio": hostile})
    photo = ana.upload(pictures.jpeg(64, 64), hostile).json()["id"]
    ana.http.post(f"/api/v1/photos/{photo}/comments", json={"body": hostile})
    for path in ("/", f"/p/{photo}", f"/u/{ana.username}", "/explore", "/settings"):
        answer = ana.http.get(path)
        assert "<script" not in answer.text
        assert "<img src=x" not in answer.text
        assert "script-src" not in answer.headers["content-security-policy"]
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_a_slow_body_is_cut_off(service: Service) -> None:
    settings = replace_timeout(service.settings, 0.2)
    with serving(settings) as slow:
        address = urlsplit(slow.url)
        assert address.hostname is not None
        with socket.create_connection((address.hostname, address.port or 80), 10) as line:
            line.sendall(
                b"POST /api/v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            answer = http.client.HTTPResponse(line)
            answer.begin()
            assert answer.status == 408


def replace_timeout(settings: Settings, timeout: float) -> Settings:
    return settings.model_copy(update={"body_timeout": timeout})


def test_only_owners_delete(join: Join) -> None:
    ana, ben, eve = join("ana"), join("ben"), join("eve")
    photo = ana.upload(pictures.jpeg(64, 64)).json()["id"]
    here = f"/api/v1/photos/{photo}"
    comment = ben.http.post(f"{here}/comments", json={"body": "mine"}).json()["id"]
    problem(eve.http.delete(here), 403, "forbidden")
    problem(eve.http.delete(f"{here}/comments/{comment}"), 403, "forbidden")
    other = eve.upload(pictures.jpeg(64, 64)).json()["id"]
    problem(eve.http.delete(f"/api/v1/photos/{other}/comments/{comment}"), 404)
    assert ben.http.get(here).json()["comment_count"] == 1
    problem(ana.http.put(f"/api/v1/users/{ana.username}/follow"), 422, "invalid-input")
