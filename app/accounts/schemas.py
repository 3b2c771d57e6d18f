"""What clients send about accounts, and what they see."""

from __future__ import annotations

import datetime as dt
import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from app.accounts.guessable import MIN_PASSWORD_BYTES, is_guessable
from app.accounts.usernames import canonical
from app.ids import IdText

__all__ = [
    "Credentials",
    "Line",
    "LoginOut",
    "Paragraph",
    "Password",
    "PasswordChange",
    "PasswordCheck",
    "PersonOut",
    "ProfileOut",
    "ProfilePatch",
    "SessionOut",
    "SignUp",
    "ViewerOut",
]

MAX_PASSWORD_BYTES = 1024

_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def _printable(value: str) -> str:
    if _UNPRINTABLE.search(value):
        raise ValueError("must not contain control or direction-override characters")
    return unicodedata.normalize("NFC", value)


def _one_line(value: str) -> str:
    return " ".join(_printable(value).split())


def _paragraph(value: str) -> str:
    return _printable(value).replace("\r\n", "\n").replace("\r", "\n").strip()


def _password(value: str) -> str:
    try:
        length = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    if length < MIN_PASSWORD_BYTES:
        raise ValueError(f"must have at least {MIN_PASSWORD_BYTES} characters")
    if length > MAX_PASSWORD_BYTES:
        raise ValueError(f"must have at most {MAX_PASSWORD_BYTES} bytes")
    if is_guessable(value):
        raise ValueError("is one that many people have, so it is guessed first; take another one")
    return value


Line = Annotated[str, AfterValidator(_one_line)]
"""Text of one line, spaces collapsed."""

Paragraph = Annotated[str, AfterValidator(_paragraph)]
"""Text that may have several lines."""

Password = Annotated[str, AfterValidator(_password), Field(examples=["a long sentence"])]
"""A password to be set; never cut, never changed."""

Username = Annotated[
    str,
    StringConstraints(max_length=100),
    AfterValidator(canonical),
    Field(examples=["ana"], description="3 to 30 letters, digits, dots and underscores"),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SignUp(_Body):
    """A new account."""

    username: Username
    password: Password
    display_name: Annotated[Line, Field(max_length=60)] = ""


class Credentials(_Body):
    """A log-in; anything of any form is looked up or fails the same way."""

    username: Annotated[str, Field(max_length=200)]
    password: Annotated[str, Field(max_length=MAX_PASSWORD_BYTES)]


class ProfilePatch(_Body):
    """Changes to one's own profile; what is left out stays."""

    display_name: Annotated[Line, Field(max_length=60)] | None = None
    bio: Annotated[Paragraph, Field(max_length=300)] | None = None
    is_private: Annotated[
        bool | None, Field(strict=True, description="only followers see one's photos")
    ] = None
    is_feed_ranked: Annotated[
        bool | None, Field(strict=True, description="one's feed is ranked, not newest first")
    ] = None


class PersonOut(BaseModel):
    """A person in a list or beside a photo."""

    id: IdText
    username: str
    display_name: str


class ViewerOut(PersonOut):
    """The person who is logged in."""

    bio: str
    is_private: bool
    is_feed_ranked: bool


class ProfileOut(PersonOut):
    """A profile as one viewer sees it.

    Attributes:
        is_open: the viewer may see the photos.
    """

    bio: str
    photo_count: int
    follower_count: int
    following_count: int
    created_at: dt.datetime
    followed_by_me: bool
    requested_by_me: bool
    blocked_by_me: bool
    is_private: bool
    is_open: bool
    is_me: bool


class LoginOut(BaseModel):
    """A log-in in the list of one's own.

    Attributes:
        client: what the browser or program called itself.
        is_current: whether it is the one that asks.
    """

    id: IdText
    client: str
    created_at: dt.datetime
    last_seen_at: dt.datetime
    expires_at: dt.datetime
    is_current: bool


class PasswordChange(_Body):
    """A new password for one's account."""

    current_password: Annotated[str, Field(max_length=MAX_PASSWORD_BYTES)]
    new_password: Password


class PasswordCheck(_Body):
    """One's password once more, for what cannot be taken back."""

    password: Annotated[str, Field(max_length=MAX_PASSWORD_BYTES)]


class SessionOut(BaseModel):
    """A log-in that just began; browsers have it as a cookie, programs send it as bearer."""

    user: ViewerOut
    token: str
    expires_at: dt.datetime
