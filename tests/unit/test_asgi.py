"""The middleware that carries tokens: what goes out, what is believed when it comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from http.cookies import SimpleCookie
from typing import Any

import pytest

from shardkit import tokens
from shardkit.contrib.asgi import COOKIE, HEADER, Freshness, FreshReads, fresh_of
from shardkit.errors import ConfigurationError

KEYS = ("a key of some sixteen bytes",)
WRITTEN = tokens.mint(10, 1, 24, {3: 1}).text
LATER = tokens.mint(10, 1, 99, {4: 1}).text

Headers = dict[str, list[str]]


def request(
    handle: Callable[[Freshness], object],
    *sent: tuple[str, str],
    scheme: str = "http",
    keys: Any = KEYS,
) -> Headers:
    """Run one request through the middleware; return the headers of its response."""
    answered: list[MutableMapping[str, Any]] = []

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        handle(fresh_of(scope))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: MutableMapping[str, Any]) -> None:
        answered.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request"}

    headers = [(name.encode(), value.encode("latin-1")) for name, value in sent]
    scope = {"type": "http", "scheme": scheme, "headers": headers}
    asyncio.run(FreshReads(app, keys=keys)(scope, receive, send))
    found: Headers = {}
    for name, value in answered[0]["headers"]:
        found.setdefault(name.decode(), []).append(value.decode())
    assert found["x"] == ["y"]
    return found


def tokens_of(*sent: tuple[str, str], keys: Any = KEYS) -> str | None:
    """Return the token that a request is given."""
    given: list[str | None] = []
    request(lambda fresh: given.append(fresh.token), *sent, keys=keys)
    return given[0]


def test_a_write_goes_out_signed_and_comes_back() -> None:
    headers = request(lambda fresh: fresh.saw(WRITTEN))
    (signed,) = headers[HEADER]
    assert signed != WRITTEN
    assert tokens_of((HEADER, signed)) == WRITTEN
    cookie = SimpleCookie(headers["set-cookie"][0])[COOKIE]
    assert cookie.value == signed
    assert cookie["httponly"]
    assert cookie["max-age"] == "60"
    assert not cookie["secure"]
    assert tokens_of(("cookie", f"a=b; {COOKIE}={signed}; c=d")) == WRITTEN


def test_over_tls_the_cookie_stays_there() -> None:
    headers = request(lambda fresh: fresh.saw(WRITTEN), scheme="https")
    assert SimpleCookie(headers["set-cookie"][0])[COOKIE]["secure"]


def test_a_request_that_saw_nothing_new_says_nothing() -> None:
    signed = request(lambda fresh: fresh.saw(WRITTEN))[HEADER][0]
    for handle in (lambda _: None, lambda fresh: fresh.saw(""), lambda fresh: fresh.saw(WRITTEN)):
        headers = request(handle, (HEADER, signed))
        assert headers.keys() == {"x"}


def test_what_was_seen_adds_up() -> None:
    first = request(lambda fresh: fresh.saw(WRITTEN))[HEADER][0]
    both = request(lambda fresh: fresh.saw(LATER), (HEADER, first))[HEADER][0]
    assert tokens_of((HEADER, both)) == tokens.merge(WRITTEN, LATER)
    second = request(lambda fresh: fresh.saw(LATER))[HEADER][0]
    merged = tokens_of((HEADER, first), ("cookie", f"{COOKIE}={second}"))
    assert merged == tokens.merge(WRITTEN, LATER)


def test_a_client_without_a_token_has_none() -> None:
    assert tokens_of() is None
    assert tokens_of(("cookie", "a=b")) is None


@pytest.mark.parametrize(
    "sent",
    ["", "x", WRITTEN, f"{WRITTEN}.", "1.x", "\xff\xfe", "a" * 10_000_000],
    ids=lambda text: text[:12],
)
def test_what_was_not_signed_asks_the_primaries(sent: str) -> None:
    assert tokens_of((HEADER, sent)) == tokens.ASK_PRIMARIES
    assert tokens_of(("cookie", f"{COOKIE}={sent}")) == tokens.ASK_PRIMARIES


def test_a_truncated_token_asks_the_primaries() -> None:
    signed = request(lambda fresh: fresh.saw(WRITTEN))[HEADER][0]
    for length in range(len(signed)):
        assert tokens_of((HEADER, signed[:length])) == tokens.ASK_PRIMARIES


def test_a_write_after_a_forged_token_is_not_lost_with_its_cookie() -> None:
    headers = request(lambda fresh: fresh.saw(WRITTEN), (HEADER, "forged"))
    assert tokens_of((HEADER, headers[HEADER][0])) == tokens.ASK_PRIMARIES


def test_keys_may_be_known_later_and_without_any_one_is_made() -> None:
    signed = request(lambda fresh: fresh.saw(WRITTEN), keys=lambda _: KEYS)[HEADER][0]
    assert tokens_of((HEADER, signed)) == WRITTEN
    assert tokens_of((HEADER, signed), keys=()) == tokens.ASK_PRIMARIES
    with pytest.raises(ConfigurationError):
        request(lambda _: None, keys=["short"])


def test_without_the_middleware_nothing_is_guessed() -> None:
    with pytest.raises(ConfigurationError, match="carried"):
        fresh_of({"type": "http"})
