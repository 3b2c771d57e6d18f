"""Who guesses learns nothing: neither who there is, nor, by a short list, what a password is."""

from __future__ import annotations

import asyncio
import datetime as dt
import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from argon2 import extract_parameters
from pydantic import ValidationError
from zxcvbn.frequency_lists import FREQUENCY_LISTS

from app.accounts.guessable import is_guessable
from app.accounts.passwords import Passwords
from app.accounts.schemas import Credentials, SignUp
from app.accounts.service import AccountService, SessionLimits
from app.clock import utc_now
from app.database import Database
from app.errors import SignInFailedError
from shardkit import AsyncCluster
from shardkit.config import load
from shardkit.local import LocalCluster
from shardkit.testing import FaultProxy, reroute
from tests.fixtures.service import PASSWORD, Person, Service

pytestmark = pytest.mark.integration

Join = Callable[[str], Person]
LIMITS = SessionLimits(idle=dt.timedelta(days=2), absolute=dt.timedelta(days=5))


# -- who there is


class Counted(Passwords):
    """Tells which hashes were computed."""

    def __init__(self) -> None:
        super().__init__(cheap=True)
        self.computed: list[str] = []

    def _matches(self, encoded: str, password: str) -> bool:
        self.computed.append(encoded)
        return super()._matches(encoded, password)


@dataclass
class Door:
    """Log-ins on links that are listened to.

    Attributes:
        accounts: the service.
        passwords: its hasher.
        proxies: in front of the primaries.
    """

    accounts: AccountService
    passwords: Counted
    proxies: list[FaultProxy] = field(default_factory=list)

    async def tried(
        self, name: str, password: str = "a wrong guess"
    ) -> tuple[list[str], list[str]]:
        """Log in, in vain; return what servers were told and which hashes were computed."""
        for proxy in self.proxies:
            proxy.forget()
        self.passwords.computed.clear()
        with pytest.raises(SignInFailedError) as caught:
            await self.accounts.log_in(Credentials(username=name, password=password))
        assert caught.value.message == SignInFailedError().message
        told = [text for proxy in self.proxies for text in proxy.statements]
        told = [text for text in told if "shardkit.ownership" not in text]  # by itself, at times
        return sorted(map(shape, told)), list(self.passwords.computed)


def shape(text: str) -> str:
    """Return a statement without the number of its logical shard."""
    return re.sub(r"shard_\d{4}|(?<=timeout = )\d+", "_", text)


@pytest.fixture
async def door(app_cluster: LocalCluster) -> AsyncIterator[Door]:
    _, topology = load(app_cluster.config_path)
    async with AsyncExitStack() as stack:
        proxies = {}
        for physical in topology.physical.values():
            url = physical.primary.url
            proxies[physical.primary] = stack.enter_context(FaultProxy(url.host, url.port))
        around = reroute(topology, proxies)
        cluster = await stack.enter_async_context(AsyncCluster(around))
        passwords = Counted()
        accounts = AccountService(Database(cluster), passwords, utc_now, LIMITS)
        yield Door(accounts, passwords, list(proxies.values()))


def nobody() -> str:
    return f"no{secrets.token_hex(6)}"


@pytest.mark.anyio
async def test_servers_are_asked_alike_whether_there_is_an_account_or_not(door: Door) -> None:
    people = [f"real{secrets.token_hex(6)}" for _ in range(4)]
    for name in people:
        await door.accounts.sign_up(SignUp(username=name, password=PASSWORD))
    for _ in range(12):  # connections to both servers are open, and statements prepared
        await door.tried(nobody())
    found = [await door.tried(name) for person in people for name in (person, nobody())]
    first = found[0][0]
    assert sum("shardkit_lookup" in text for text in first) == 1
    assert sum("users.username =" in text for text in first) == 1
    for told, hashes in found:
        assert told == first
        assert len(hashes) == 1
    assert all(hashes != found[1][1] for _, hashes in found[::2]), "each has one of its own"
    assert all(hashes == found[1][1] for _, hashes in found[1::2]), "nobody's is one that is made"
    cost = {str(extract_parameters(hashes[0])) for _, hashes in found}
    assert len(cost) == 1, "all cost the same"


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["", "x", "admin", "no name", "\U0001f600" * 9, "a\0b"])
async def test_a_name_that_nobody_can_have_costs_a_hash_too(door: Door, name: str) -> None:
    told, hashes = await door.tried(name)
    assert (told, len(hashes)) == ([], 1)


@pytest.mark.anyio
async def test_the_hash_that_is_made_for_nobody_lets_nobody_in(door: Door) -> None:
    _, hashes = await door.tried(nobody(), "nobody has this password")
    assert door.passwords._hasher.verify(hashes[0], "nobody has this password"), "it does match"


def test_it_costs_what_a_real_one_costs() -> None:
    passwords = Passwords()
    made = asyncio.run(passwords.hash(PASSWORD))
    assert extract_parameters(passwords._dummy) == extract_parameters(made)


def test_answers_are_alike(join: Join, service: Service) -> None:
    """But for what was typed, and for what is new in every answer."""
    seen: list[list[Any]] = []
    for name in (join("real").username, nobody()):
        with service.client() as client:
            given = {"username": name, "password": "a wrong guess"}
            plain = client.post("/api/v1/sessions", json=given)
            page = client.post("/login", data=given)
        assert {plain.status_code, page.status_code} == {401}
        text = re.sub(r'name="key" value="[^"]*"', "", page.text).replace(name, "")
        text = text.replace(page.headers["x-request-id"], "")
        headers = [sorted(set(answer.headers) - {"content-length"}) for answer in (plain, page)]
        seen.append([{**plain.json(), "request_id": ""}, text, headers])
    assert seen[0] == seen[1]


# -- what a password is

COMMON = ["password", "PassWord", "iloveyou", "1qaz2wsx", "\uff50assword", "Baseball", "1234567890"]


def test_the_list_is_long_and_none_of_it_is_taken() -> None:
    listed = [each for each in FREQUENCY_LISTS["passwords"] if len(each) >= 8]
    assert len(listed) > 10_000
    for password in listed:
        with pytest.raises(ValidationError, match="many people have"):
            SignUp(username="fine", password=password)
    for password in (PASSWORD, "password of ana's", "xpassword", "correct horse battery staple"):
        assert not is_guessable(password)


def refused(answer: httpx.Response, field_name: str) -> bool:
    """Tell whether a password was refused for being common, and not told back."""
    if answer.headers["content-type"].startswith("text/html"):
        return answer.status_code == 422 and "is one that many people have" in answer.text
    (problem,) = answer.json()["errors"]
    is_so = problem["field"] == field_name and "many people have" in problem["message"]
    return answer.status_code == 422 and is_so


@pytest.mark.parametrize("password", COMMON)
def test_no_account_begins_with_a_common_one(service: Service, password: str) -> None:
    given = {"username": nobody(), "password": password}
    with service.client() as client:
        assert refused(client.post("/api/v1/users", json=given), "password")
        assert refused(client.post("/signup", data=given), "password")
        assert client.get(f"/api/v1/users/{given['username']}").status_code == 404
        better = client.post("/api/v1/users", json={**given, "password": f"{password} {nobody()}"})
        assert better.status_code == 201


def test_none_is_changed_to_a_common_one(join: Join, service: Service) -> None:
    ana = join("ana")
    for password in COMMON:
        given = {"current_password": PASSWORD, "new_password": password}
        assert refused(ana.http.put("/api/v1/me/password", json=given), "new_password")
        assert refused(ana.http.post("/settings/password", data=given), "new_password")
    with service.client() as client:
        given = {"username": ana.username, "password": PASSWORD}
        assert client.post("/api/v1/sessions", json=given).status_code == 201, "it is what it was"
