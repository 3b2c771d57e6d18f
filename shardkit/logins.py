"""The sections of `shardkit.toml` about who logs in and how: `[admin]`, `[roles]`, `[tls]`.

Secrets come from the environment, from a file, or from `shardkit.toml` itself, in this order, and
never from a command line. A file that is missing, or that others may read, is refused with one
line. Called by `shardkit.config`; opens no connection.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from shardkit.errors import ConfigurationError
from shardkit.secret import Secret

__all__ = ["DUTIES", "AdminLogin", "Login", "RolesConfig", "Section", "TlsConfig", "role_name"]

DUTIES: Final = ("app", "migrator", "mover", "relay", "monitor")
"""What a role may be for, beside owning everything: the keys of `[roles]`."""


class Section(BaseModel):
    """A section: immutable, and nothing in it that is not known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


def role_name(name: str) -> str:
    """Return a role's name, or refuse what PostgreSQL would cut, reserve or read differently.

    Raises:
        ValueError: it cannot be one.
    """
    size = len(name.encode("utf-8", "surrogatepass"))
    if not 0 < size < 64:
        raise ValueError(f"a role's name has 1 to 63 bytes, and this has {size}")
    if not name.isprintable():
        raise ValueError("a role's name has no control characters")
    if name.startswith("pg_") or name in {"public", "none"}:
        raise ValueError(f"PostgreSQL keeps the name {name!r} for itself; choose another")
    return name


class Login(Section):
    """`[roles.…]`: one role that logs in."""

    user: str | None = None
    """Its name; `shardkit_` and what it is for when it is left out, and the user of the addresses
    for the application."""

    password: SecretStr | None = None
    password_file: str | None = None
    cert: str | None = None
    """File of its client certificate; else that of `[tls]`."""

    key: str | None = None
    """File of the certificate's key, which nobody else may read."""

    @field_validator("user")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        return None if value is None else role_name(value)

    @model_validator(mode="after")
    def _has_both(self) -> Self:
        if (self.cert is None) is not (self.key is None):
            raise ValueError("cert and key: give both, or neither")
        return self

    def secret(self, folder: Path, duty: str, *, key: str | None = None) -> Secret | None:
        """Return the password, or None; that of the environment wins.

        Args:
            folder: where a relative `password_file` is looked up.
            duty: what it is for: one of `DUTIES`, or `admin`.
            key: what the file is called in messages; None for the key of `shardkit.toml`.

        Raises:
            ConfigurationError: the file is missing, unreadable or open to others.
        """
        section = "admin" if duty == "admin" else f"roles.{duty}"
        key = key or f"{section}.password_file"
        variable = f"SHARDKIT_{duty.upper()}_PASSWORD"
        if from_environment := Secret(os.environ.get(variable, "")):
            return _usable(from_environment, variable)
        if self.password_file is not None:
            file = checked(folder / self.password_file, key, is_secret=True)
            return _usable(_contents(file, key), key)
        if self.password is not None:
            return _usable(Secret(self.password.get_secret_value()), f"{section}.password")
        return None

    def certificate(self, folder: Path, key: str) -> dict[str, str]:
        """Return libpq's options of the client certificate; none when there is none."""
        if self.cert is None or self.key is None:
            return {}
        return {
            "sslcert": str(checked(folder / self.cert, f"{key}.cert")),
            "sslkey": str(checked(folder / self.key, f"{key}.key", is_key=True)),
        }


class AdminLogin(Login):
    """`[admin]`: the login that makes roles, and does what has no role of its own."""

    user: Annotated[str, Field(min_length=1, max_length=63)]


class RolesConfig(Section):
    """`[roles]`: logins for what the application's or the admin's would do otherwise."""

    owner: str | None = None
    """Who owns schemas, tables and functions, and cannot log in; `shardkit_owner` once there is a
    migrator, else the admin."""

    app: Login | None = None
    migrator: Login | None = None
    mover: Login | None = None
    relay: Login | None = None
    monitor: Login | None = None

    @field_validator("owner")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        return None if value is None else role_name(value)

    @property
    def is_on(self) -> bool:
        """Whether anything is said."""
        return self.owner is not None or any(True for _ in self.logins)

    @property
    def logins(self) -> Iterator[tuple[str, Login]]:
        """What each login is for, and the login."""
        for duty in DUTIES:
            login: Login | None = getattr(self, duty)
            if login is not None:
                yield duty, login

    def user(self, duty: str) -> str | None:
        """Return the name of a role; None where it has no login of its own."""
        login: Login | None = getattr(self, duty)
        if login is None:
            return None
        return login.user or (None if duty == "app" else f"shardkit_{duty}")

    def owner_or(self, admin: str) -> str:
        """Return who owns everything."""
        if self.owner is not None:
            return self.owner
        return "shardkit_owner" if self.migrator else admin

    @model_validator(mode="after")
    def _are_different(self) -> Self:
        if self.migrator is None and (self.owner is not None or self.mover is not None):
            raise ValueError(
                f"{'owner' if self.owner is not None else 'mover'}: needs a migrator, "
                "who makes what the owner owns; add roles.migrator"
            )
        taken = {self.owner_or(""): "owner"}
        for duty, _ in self.logins:
            name = self.user(duty)
            if name is not None and name in taken:
                raise ValueError(
                    f"{duty}: {name!r} is the {taken[name]} already; "
                    "each has a name of its own, or is left out"
                )
            if name is not None:
                taken[name] = duty
        return self


class TlsConfig(Section):
    """`[tls]`: how connections to PostgreSQL and PgBouncer are protected; an address may differ."""

    mode: Literal["disable", "prefer", "require", "verify-ca", "verify-full"] | None = None
    """libpq's `sslmode`; only `verify-full` proves who answers."""

    root_cert: str | None = None
    """File of who signs the servers' certificates; `system` for those the system trusts."""

    cert: str | None = None
    key: str | None = None
    """The client certificate and its key, which nobody else may read."""

    channel_binding: Literal["disable", "prefer", "require"] | None = None
    """`require` ties SCRAM to the TLS connection; PgBouncer cannot, and is not asked to."""

    require_auth: Annotated[str, Field(pattern=r"^!?[a-z0-9-]+(,!?[a-z0-9-]+)*$")] | None = None
    """What a server may ask for: `scram-sha-256` refuses one that asks for the password itself."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.cert is None) is not (self.key is None):
            raise ValueError("cert and key: give both, or neither")
        if self.mode in {"verify-ca", "verify-full"} and self.root_cert is None:
            raise ValueError(
                f'root_cert: {self.mode} needs to know whom to trust; name a file, or "system"'
            )
        if self.root_cert == "system" and self.mode != "verify-full":
            raise ValueError('root_cert: "system" goes with mode = "verify-full" only')
        if self.root_cert is not None and self.mode not in {"verify-ca", "verify-full"}:
            raise ValueError(f"mode: {self.mode or 'none'} checks no certificate; say verify-full")
        if self.channel_binding == "require" and self.mode in {None, "disable", "prefer"}:
            raise ValueError('channel_binding: needs TLS; say mode = "verify-full"')
        return self

    def options(self, folder: Path, *, is_pooled: bool) -> dict[str, str]:
        """Return libpq's options.

        Args:
            folder: where relative files are looked up.
            is_pooled: whether a PgBouncer answers.

        Raises:
            ConfigurationError: a file is missing, unreadable or open to others.
        """
        found: dict[str, str] = {}
        if self.mode is not None:
            found["sslmode"] = self.mode
        if self.root_cert == "system":
            found["sslrootcert"] = self.root_cert
        elif self.root_cert is not None:
            found["sslrootcert"] = str(checked(folder / self.root_cert, "tls.root_cert"))
        if self.cert is not None and self.key is not None:
            found["sslcert"] = str(checked(folder / self.cert, "tls.cert"))
            found["sslkey"] = str(checked(folder / self.key, "tls.key", is_key=True))
        if self.channel_binding is not None:
            binding = self.channel_binding
            found["channel_binding"] = "prefer" if is_pooled and binding == "require" else binding
        if self.require_auth is not None:
            found["require_auth"] = self.require_auth
        return found


def checked(file: Path, key: str, *, is_secret: bool = False, is_key: bool = False) -> Path:
    """Return a file that can be read, and by nobody who should not.

    Args:
        file: its path.
        key: of `shardkit.toml`, for the message.
        is_secret: whether others may not read it.
        is_key: whether libpq will ask for as much as it does of keys: the group may not read it
            either, unless it is root's.

    Raises:
        ConfigurationError: it is missing, no file, unreadable or open to others.
    """
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ConfigurationError(f"{key}: {file} is no file; name one")
        with file.open("rb"):
            pass
    except FileNotFoundError:
        raise ConfigurationError(f"{key}: {file}: no such file; correct the path") from None
    except OSError as error:
        raise ConfigurationError(
            f"{key}: {file}: cannot be read: {error.strerror}; "
            "give it to the user who runs this program"
        ) from None
    mode = stat.S_IMODE(found.st_mode)
    # Source: PostgreSQL, fe-secure-openssl.c, initialize_SSL.
    forbidden = (0o037 if found.st_uid == 0 else 0o077) if is_key else 0o007 if is_secret else 0
    if mode & forbidden:
        whose = "the group or others" if is_key else "others"
        raise ConfigurationError(f"{key}: {file} may be read by {whose}; run `chmod 600 {file}`")
    return file


def _contents(file: Path, key: str) -> Secret:
    try:
        return Secret(file.read_text(encoding="utf-8").strip("\r\n"))
    except (OSError, UnicodeDecodeError):
        pass
    # Not while the error is handled, whose text has what was read.
    raise ConfigurationError(f"{key}: {file}: cannot be read as UTF-8")


def _usable(text: Secret, key: str) -> Secret:
    if not text or not {"\0", "\r", "\n"}.isdisjoint(text):
        raise ConfigurationError(f"{key}: is empty, or has more than one line; write the password")
    return text
