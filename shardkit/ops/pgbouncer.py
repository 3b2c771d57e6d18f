"""`pgbouncer.ini` and `userlist.txt` as text, from templates. Pure: asks nobody, writes nothing.

Called by `shardkit.ops.poolers` and by the embedded cluster. Names and values are quoted for the
place where they stand; what no quoting can carry there is refused.
Source: PgBouncer's documentation, "pgbouncer.ini" and "userlist.txt"; PgBouncer's loader.c.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Final

from shardkit.errors import ConfigurationError

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["PooledDatabase", "PoolerSettings", "render_ini", "render_userlist"]

_PLAIN_NAME: Final = re.compile(r"[a-z_][a-z0-9_]*")

_WAITS: Final = {
    # One that PgBouncer keeps up by itself, so that it knows of a server that is gone before a
    # client has to wait for it; from then on it refuses at once.
    "min_pool_size": "1",
    # A client that is made to wait has time left to be answered by another server.
    "query_wait_timeout": "2",
    "server_connect_timeout": "2",
    "server_login_retry": "1",
    "tcp_keepidle": "10",
    "tcp_keepintvl": "5",
    "tcp_keepcnt": "3",
}

_MAX_PREPARED: Final = "200"
"""Statements prepared per client that are carried: psycopg's own cache holds 100 per connection."""


@dataclass(frozen=True, slots=True)
class PooledDatabase:
    """Where a name leads that clients of a PgBouncer ask for.

    Attributes:
        name: that clients ask for.
        host: of PostgreSQL.
        port: of PostgreSQL.
        dbname: of the database there.
        is_read_only: whether the connections to it refuse to write.
        size: server connections for each login; 0 for `default_pool_size`.
    """

    name: str
    host: str
    port: int
    dbname: str
    is_read_only: bool = False
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolerSettings:
    """One PgBouncer in transaction mode.

    Attributes:
        databases: names that clients may ask for.
        listen_addr: where it listens.
        port: where it listens.
        sockets: folder of its unix socket, where the console takes commands.
        userlist: path of the logins.
        stats_users: logins that may look at the console, for `shardkit doctor`.
        version: of the program, as numbers; empty when unknown.
        max_clients: connections of clients.
        auth_user: login that asks the servers for the verifiers of others; empty for a list.
        auth_query: what it asks.
        settings: further settings by name; they win.
    """

    databases: Sequence[PooledDatabase]
    port: int
    sockets: str
    userlist: str
    listen_addr: str = "127.0.0.1"
    stats_users: Sequence[str] = ()
    version: Sequence[int] = ()
    max_clients: int = 1000
    auth_user: str = ""
    auth_query: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


def render_ini(pooler: PoolerSettings) -> str:
    """Return `pgbouncer.ini`.

    Raises:
        ConfigurationError: a name or value cannot be written there, or Jinja2 is not installed.
    """
    settings = {"max_client_conn": str(pooler.max_clients), "default_pool_size": "20", **_WAITS}
    if tuple(pooler.version) >= (1, 21):
        settings["max_prepared_statements"] = _MAX_PREPARED
    values = {each.name: getattr(pooler, each.name) for each in fields(pooler)}
    values["settings"] = {**settings, **pooler.settings}
    return _environment().get_template("pgbouncer.ini.j2").render(values)


def render_userlist(logins: Mapping[str, str]) -> str:
    """Return `userlist.txt`.

    Args:
        logins: password, or SCRAM secret of the server, by name.

    Raises:
        ConfigurationError: a name or password cannot be written there.
    """
    return _environment().get_template("userlist.txt.j2").render(logins=logins)


@cache
def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415  an extra
    except ImportError as error:
        raise ConfigurationError(
            "Jinja2 is not installed", hint="pip install shardkit[pgbouncer]"
        ) from error
    made = Environment(
        loader=PackageLoader("shardkit"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  this is no HTML; every value passes a filter below
    )
    made.filters.update(name=_name, value=_value, plain=_plain, login=_login, key=_key)
    return made


def _name(text: str) -> str:
    """Return the name of a database or user, quoted like an identifier of SQL where it has to be.

    A database called `pgbouncer` would be the console, and `*` any.
    """
    text = _line(text)
    if text in {"", "pgbouncer"}:
        raise ConfigurationError(f"{text!r} cannot be a name for PgBouncer", hint="rename it")
    if _PLAIN_NAME.fullmatch(text):
        return text
    return '"' + text.replace('"', '""') + '"'


def _value(text: str) -> str:
    """Return a value of a connect string, quoted."""
    return "'" + _line(text).replace("'", "''") + "'"


def _plain(text: str) -> str:
    """Return a setting's value, which PgBouncer reads to the end of its line without quotes."""
    text = _line(text)
    if text != text.strip():
        raise ConfigurationError(
            f"{text!r} begins or ends with a blank", hint="PgBouncer would read it without"
        )
    return text


def _key(text: str) -> str:
    if not _PLAIN_NAME.fullmatch(text):
        raise ConfigurationError(f"{text!r} is no setting of PgBouncer", hint="correct its name")
    return text


def _login(text: str) -> str:
    """Return one field of the list of logins, quoted."""
    return '"' + _line(text, is_secret=True).replace('"', '""') + '"'


def _line(text: str, *, is_secret: bool = False) -> str:
    """Return a text that fits a line, or refuse it without showing a secret."""
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        shown = "a password" if is_secret else repr(text)
        raise ConfigurationError(
            f"{shown} has a control character, which PgBouncer's files cannot hold",
            hint="change it",
        )
    return text
