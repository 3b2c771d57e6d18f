"""Sign-up, log-in, log-out and profiles.

Called by the API and by the pages. A log-in is checked on the primary every time, so that a
log-out takes effect at once whatever the replicas have seen.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app import happenings
from app.accounts.models import LoginSession, User
from app.accounts.passwords import Passwords
from app.accounts.repository import (
    AccountRepository,
    delete_logins,
    person_of_name,
    touch_login,
)
from app.accounts.schemas import (
    Credentials,
    PersonOut,
    ProfileOut,
    ProfilePatch,
    SignUp,
    ViewerOut,
)
from app.clock import Clock
from app.database import Database, Request
from app.errors import NotFoundError, SignInFailedError, UsernameTakenError
from app.graph.models import COUNTED, Kind, count_of
from app.graph.tao import on
from app.graph.ties import NOBODY, followers_with, ties_of
from app.ids import parse_id
from app.limits.limiter import Limiter
from app.partial import counted
from shardkit import AsyncReadSession, AsyncWriteSession
from shardkit.errors import (
    InvalidIdError,
    InvalidShardKeyError,
    OutcomeUnknownError,
    UniqueViolationError,
)

__all__ = ["AccountService", "LogIn", "SessionLimits", "Viewer"]

SECRET_BYTES = 32
"""Random bytes of a log-in's secret: 256 bits."""

TOUCH_AFTER = dt.timedelta(minutes=5)
"""How stale `last_seen_at` may become, so that reading does not write every time."""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """When a log-in ends.

    Attributes:
        idle: after so long without use.
        absolute: after so long in any case.
    """

    idle: dt.timedelta
    absolute: dt.timedelta


@dataclass(frozen=True, slots=True)
class Viewer:
    """The person who is logged in.

    Attributes:
        id: the user id.
        username: the canonical name.
        display_name: how the person is called.
        bio: what the person says about themselves.
        login_id: id of the log-in used.
        is_private: whether only followers see the person's photos.
        is_feed_ranked: whether the person's feed is ranked, or newest first.
    """

    id: int
    username: str
    display_name: str
    bio: str
    login_id: int
    is_private: bool = False
    is_feed_ranked: bool = False

    def out(self) -> ViewerOut:
        """Return the viewer as clients see it."""
        return ViewerOut(
            id=self.id,
            username=self.username,
            display_name=self.display_name,
            bio=self.bio,
            is_private=self.is_private,
            is_feed_ranked=self.is_feed_ranked,
        )


@dataclass(frozen=True, slots=True)
class LogIn:
    """A log-in that just began.

    Attributes:
        viewer: who.
        token: `"<log-in id>.<secret>"`; the id routes, the secret proves.
        expires_at: when it ends at the latest.
    """

    viewer: Viewer
    token: str
    expires_at: dt.datetime


class AccountService:
    """What people do with accounts.

    Args:
        database: the client's sessions.
        passwords: the hasher.
        clock: the time.
        limits: when log-ins end.
        limiter: counts wrong passwords; None counts none.
        client: what the browser or program calls itself.
    """

    def __init__(
        self,
        database: Database,
        passwords: Passwords,
        clock: Clock,
        limits: SessionLimits,
        *,
        limiter: Limiter | None = None,
        client: str = "",
    ) -> None:
        self._database = database
        self._passwords = passwords
        self._clock = clock
        self._limits = limits
        self._limiter = limiter
        self._client = client

    async def sign_up(self, wanted: SignUp) -> LogIn:
        """Create an account and log it in.

        A name that has been given to the same person meanwhile, in an earlier try of the same
        request, is theirs: they know the password.

        Raises:
            UsernameTakenError: somebody has the name.
        """
        what = ("sign up", wanted.username, wanted.display_name)
        password_hash = await self._passwords.hash(wanted.password)
        try:
            user = await self.create(wanted.username, wanted.display_name, password_hash)
        except (UsernameTakenError, OutcomeUnknownError):
            if not self._database.has_key:
                raise
            found = await person_of_name(self._database, wanted.username)
            if found is None or not await self._passwords.verify(
                found.password_hash, wanted.password
            ):
                raise
            user = found
        return await self._begin(user, what)

    async def create(
        self, username: str, display_name: str, password_hash: str, bio: str = ""
    ) -> User:
        """Create a user with a unique name.

        Raises:
            UsernameTakenError: somebody has the name.
        """
        user = User(
            username=username,
            display_name=display_name or username,
            bio=bio,
            password_hash=password_hash,
            created_at=self._clock(),
        )
        async with self._database.writer() as session:
            session.add(user)
            try:
                await session.commit()
            except UniqueViolationError:
                raise UsernameTakenError from None
        return user

    async def log_in(self, given: Credentials) -> LogIn:
        """Begin a log-in.

        Raises:
            SignInFailedError: the name or the password is wrong; both look and last the same.
            TooManyRequestsError: this name had too many wrong passwords (retryable).
            BusyError: nobody can count them at the moment (retryable).
        """
        if self._limiter is not None:
            await self._limiter.begin_log_in(given.username)
        user = await person_of_name(self._database, given.username)
        encoded = None if user is None else user.password_hash
        if not await self._passwords.verify(encoded, given.password) or user is None:
            raise SignInFailedError
        if self._limiter is not None:
            await self._limiter.succeeded(given.username)
        return await self._begin(user, ("log in", user.username))

    async def log_out(self, viewer: Viewer, *, everywhere: bool = False) -> None:
        """End this log-in, or all of the person."""
        async with self._database.writer() as session:
            only = None if everywhere else viewer.login_id
            await delete_logins(session, viewer.id, only=only)
            await session.commit()

    async def viewer(self, token: str | None) -> Viewer | None:
        """Return who a log-in token belongs to, or None when it is no valid one.

        Args:
            token: as the client sent it; anything at all.
        """
        login_id, secret = _split(token)
        if login_id is None:
            return None
        now = self._clock()
        async with self._database.primary() as session:
            repository = AccountRepository(session)
            try:
                login = await repository.login(login_id)
            except (InvalidIdError, InvalidShardKeyError):
                return None
            if login is None or not hmac.compare_digest(login.token_hash, _digest(secret)):
                return None
            if now >= login.expires_at or now - login.last_seen_at >= self._limits.idle:
                return None
            try:
                user = await repository.user(login.user_id)
            except NotFoundError:
                return None
            viewer = _viewer(user, login.id)
            if now - login.last_seen_at >= TOUCH_AFTER:
                await touch_login(session, login, now)
            return viewer

    async def profile(self, name: str, viewer: Viewer | None) -> ProfileOut:
        """Return a profile as a viewer sees it.

        Raises:
            NotFoundError: nobody has the name.
        """
        async with self._database.reader() as session:
            user = await AccountRepository(session).user_by_name(name)
            if user is None:
                raise NotFoundError("There is no such person.")
            ties = NOBODY
            if viewer is not None and viewer.id != user.id:
                ties = await on(session, ties_of, viewer.id, user.id)
            if ties.is_blocked:
                raise NotFoundError("There is no such person.")
            if viewer is not None and ties.follows != ties.is_counted:
                n_followers, is_counted = await on(session, followers_with, viewer.id, user.id)
                # The relay has not been there yet; who has just followed sees it counted.
                n_followers += ties.follows - is_counted
            else:
                n_followers = await _count(session, user, Kind.FOLLOWED_BY)
                # A count from the cache may be a moment older than the edge.
                n_followers = max(n_followers, int(ties.follows))
            n_following = await _count(session, user, Kind.FOLLOWS)
        is_me = viewer is not None and viewer.id == user.id
        return ProfileOut(
            id=user.id,
            username=user.username,
            display_name=user.display_name,
            bio=user.bio,
            photo_count=user.photo_count,
            follower_count=n_followers,
            following_count=n_following,
            created_at=user.created_at,
            followed_by_me=ties.follows,
            requested_by_me=ties.requested,
            blocked_by_me=ties.blocks,
            is_private=user.is_private,
            is_open=is_me or not (ties.blocks or (user.is_private and not ties.follows)),
            is_me=is_me,
        )

    async def edit(self, viewer: Viewer, patch: ProfilePatch) -> ViewerOut:
        """Change the viewer's profile and return it."""

        async def work(session: AsyncWriteSession) -> dict[str, Any]:
            user = await AccountRepository(session).user(viewer.id)
            if patch.display_name is not None:
                user.display_name = patch.display_name or user.username
                happenings.person_changed(session, viewer.id)
            if patch.bio is not None:
                user.bio = patch.bio
            if patch.is_private is not None:
                user.is_private = patch.is_private
            if patch.is_feed_ranked is not None:
                user.is_feed_ranked = patch.is_feed_ranked
            return _viewer(user, viewer.login_id).out().model_dump(mode="json")

        request = Request(viewer.id, ("edit", patch.model_dump(exclude_unset=True)))
        return ViewerOut.model_validate(await self._database.run(request, work, near=viewer.id))

    async def newest(self, n: int) -> Sequence[PersonOut]:
        """Return people who joined last, newest first."""
        async with self._database.reader() as session:
            users = await AccountRepository(session).newest(n)
        return [person_out(user) for user in users]

    async def _begin(self, user: User, what: tuple[str, ...]) -> LogIn:
        """Begin a log-in; a repetition of the request gets the same one.

        The record of the request keeps what the secret is made of together with the client's
        key, not the secret.
        """

        async def work(session: AsyncWriteSession) -> tuple[str, str, str]:
            now = self._clock()
            salt = secrets.token_bytes(SECRET_BYTES)
            login = LoginSession(
                user_id=user.id,
                token_hash=_digest(self._database.secret(salt).hex()),
                client=self._client,
                created_at=now,
                last_seen_at=now,
                expires_at=now + self._limits.absolute,
            )
            await delete_logins(session, user.id, expired_at=now)
            session.add(login)
            await session.flush()
            return str(login.id), salt.hex(), login.expires_at.isoformat()

        login_id, salt, expires = await self._database.run(
            Request(user.id, what), work, near=user.id
        )
        secret = self._database.secret(bytes.fromhex(salt)).hex()
        return LogIn(
            _viewer(user, int(login_id)), f"{login_id}.{secret}", dt.datetime.fromisoformat(expires)
        )


async def _count(session: AsyncReadSession, user: User, kind: Kind) -> int:
    key = (user.id, int(kind))
    return (await counted(session, count_of, {key: getattr(user, COUNTED[kind])}))[key]


def person_out(user: User) -> PersonOut:
    """Return a user as it appears in lists."""
    return PersonOut(id=user.id, username=user.username, display_name=user.display_name)


def _viewer(user: User, login_id: int) -> Viewer:
    return Viewer(
        user.id,
        user.username,
        user.display_name,
        user.bio,
        login_id,
        is_private=user.is_private,
        is_feed_ranked=user.is_feed_ranked,
    )


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _split(token: str | None) -> tuple[int | None, str]:
    login_id, _, secret = (token or "").partition(".")
    try:
        return parse_id(login_id), secret
    except ValueError:
        return None, ""
