"""Log-ins that end by time, and usernames that a crash left behind, with a clock that is told."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from sqlalchemy import select

from app.accounts.models import LoginSession, User
from app.accounts.passwords import Passwords
from app.accounts.schemas import Credentials, SignUp
from app.accounts.service import AccountService, SessionLimits
from app.clock import utc_now
from app.database import Database
from app.errors import SignInFailedError, UsernameTakenError
from app.resources import open_resources
from shardkit import AsyncCluster, ids
from tests.fixtures.service import PASSWORD, Service

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

LIMITS = SessionLimits(idle=dt.timedelta(days=2), absolute=dt.timedelta(days=5))


@dataclass
class ToldClock:
    """A clock that moves when told to."""

    now: dt.datetime = field(default_factory=utc_now)

    def __call__(self) -> dt.datetime:
        return self.now

    def move(self, **by: float) -> None:
        """Move forward."""
        self.now += dt.timedelta(**by)


@dataclass
class Setting:
    """An account service on a told clock."""

    accounts: AccountService
    clock: ToldClock
    cluster: AsyncCluster

    def database(self) -> Database:
        """Return sessions of a client of its own."""
        return Database(self.cluster)


@pytest.fixture
async def here(service: Service) -> AsyncIterator[Setting]:
    clock = ToldClock()
    async with open_resources(service.settings, clock) as resources:
        database = Database(resources.cluster)
        accounts = AccountService(database, Passwords(cheap=True), clock, LIMITS)
        yield Setting(accounts, clock, resources.cluster)


_names = iter(f"timed{n}" for n in range(1000))


def new_account() -> SignUp:
    return SignUp(username=next(_names), password=PASSWORD)


async def test_a_log_in_unused_for_long_ends(here: Setting) -> None:
    login = await here.accounts.sign_up(new_account())
    for _ in range(2):
        here.clock.move(days=1, hours=23)
        assert await here.accounts.viewer(login.token) is not None
    here.clock.move(days=2)
    assert await here.accounts.viewer(login.token) is None


async def test_a_log_in_ends_however_much_it_is_used(here: Setting) -> None:
    login = await here.accounts.sign_up(new_account())
    for _ in range(4):
        here.clock.move(days=1)
        assert await here.accounts.viewer(login.token) is not None
    here.clock.move(days=1)
    assert await here.accounts.viewer(login.token) is None


async def test_a_log_in_clears_expired_ones_away(here: Setting) -> None:
    account = new_account()
    login = await here.accounts.sign_up(account)
    here.clock.move(days=6)
    given = Credentials(username=account.username, password=PASSWORD)
    await here.accounts.log_in(given)
    async with here.database().primary() as session:
        old = int(login.token.partition(".")[0])
        assert await session.get(LoginSession, old) is None


async def test_only_a_hash_of_the_secret_is_stored(here: Setting) -> None:
    login = await here.accounts.sign_up(new_account())
    number, _, secret = login.token.partition(".")
    assert len(secret) >= 22  # 128 bits
    async with here.database().primary() as session:
        stored = await session.get_one(LoginSession, int(number))
        found = select(User.password_hash).where(User.id == stored.user_id)
        password_hash = (await session.scalars(found)).one()
    assert secret.encode() not in stored.token_hash
    assert password_hash.startswith("$argon2id$")
    assert PASSWORD not in password_hash


async def test_a_name_whose_sign_up_never_ended_can_be_had(here: Setting) -> None:
    """The name was reserved, then the connection of the user's own transaction broke."""
    account = new_account()
    async with here.database().writer() as session:
        ghost = User(
            username=account.username, display_name="", password_hash="", created_at=here.clock()
        )
        session.add(ghost)
        await session.flush()
        shard = {"logical_shard": ids.shard_of(ghost.id)}
        await (await session.connection(bind_arguments=shard)).invalidate()
    given = Credentials(username=account.username, password=PASSWORD)
    with pytest.raises(SignInFailedError):
        await here.accounts.log_in(given)
    login = await here.accounts.sign_up(account)
    assert (await here.accounts.log_in(given)).viewer.id == login.viewer.id
    with pytest.raises(UsernameTakenError):
        await here.accounts.sign_up(account)


def test_real_hashes_cost_what_they_should() -> None:
    encoded = Passwords()._dummy
    assert encoded.startswith("$argon2id$v=19$m=47104,t=1,p=1$")
