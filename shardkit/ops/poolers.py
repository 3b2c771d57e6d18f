"""`shardkit pgbouncer render`: PgBouncer's files for every physical shard, as it is now.

Each server is asked what it is and how many connections it takes; names lead to the server that
has the role now, whatever `shardkit.toml` says. Called by the command line; writes files, and
changes nothing on any server.
"""

from __future__ import annotations

import pwd
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from sqlalchemy import URL

from shardkit import deadlines
from shardkit.config import Config, PgBouncerConfig
from shardkit.errors import ConfigurationError
from shardkit.ops.files import replace_file
from shardkit.ops.health.facts import Expected, Server
from shardkit.ops.health.questions import ask_server
from shardkit.ops.pgbouncer import PooledDatabase, PoolerSettings, render_ini, render_userlist
from shardkit.parallel import run
from shardkit.secret import Secret
from shardkit.topology import Endpoint, PhysicalShard, Role, Topology

__all__ = [
    "Rendered",
    "Seen",
    "changed",
    "demands",
    "names",
    "placed",
    "render",
    "server_url",
    "shares",
    "tls_settings",
    "write",
]

TIMEOUT: Final = 5.0
"""Seconds that all servers together have to answer."""

KEPT: Final = 10
"""Connections of a server that are left to commands, replicas and moves. A choice."""

_DEFAULT_MAX = 100
"""PostgreSQL's own `max_connections`, for a server that does not answer."""

_LEAST = 2
"""A writer that mints ids needs a second server connection while its transaction is open."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One server: its address with the application's login, and what it says; None for nothing."""

    url: URL
    server: Server | None


@dataclass(frozen=True, slots=True)
class Rendered:
    """The files of one physical shard.

    Attributes:
        physical: its name.
        ini: text of `pgbouncer.ini`.
        userlist: text of `userlist.txt`, which holds passwords.
        databases: names and where they lead.
        silent: addresses of servers that did not answer, and were taken for what the file says.
    """

    physical: str
    ini: str
    userlist: str
    databases: tuple[PooledDatabase, ...]
    silent: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Rendered({self.physical!r})"


def render(
    config: Config,
    topology: Topology,
    *,
    folder: Path,
    timeout: float = TIMEOUT,
    logins: Mapping[str, str] | None = None,
) -> list[Rendered]:
    """Return the files of every physical shard, in the order of the configuration.

    Args:
        config: the file.
        topology: made of it.
        folder: where the files are going to be, one folder for each physical shard in it.
        timeout: seconds that all servers have to answer.
        logins: passwords by name that the file does not tell, such as that of `auth_user`.

    Raises:
        ConfigurationError: the address of a server behind a pooler, or a password, is not known.
    """
    shards = list(topology.physical.values())
    servers = [(shard, endpoint, server_url(shard, endpoint)) for shard in shards
               for endpoint in shard.endpoints]  # fmt: skip
    asks = [
        partial(
            ask_server,
            endpoint,
            shard.looking_at(url),
        )
        for shard, endpoint, url in servers
    ]
    with deadlines.deadline(timeout):
        answers = run(asks)
    seen: dict[str, list[Seen]] = {}
    for (shard, _, url), answer in zip(servers, answers, strict=True):
        found = None if isinstance(answer, Exception) else answer
        seen.setdefault(shard.name, []).append(Seen(url, found))
    expected = Expected(topology, pool=config.pool.size + config.pool.overflow,
                        processes=config.pgbouncer.processes)  # fmt: skip
    return [
        _rendered(
            shard, seen[shard.name], expected, config.pgbouncer, folder=folder, logins=logins or {}
        )
        for shard in shards
    ]


def _rendered(
    shard: PhysicalShard,
    seen: Sequence[Seen],
    expected: Expected,
    options: PgBouncerConfig,
    *,
    folder: Path,
    logins: Mapping[str, str],
) -> Rendered:
    primary, *replicas = placed(seen)
    databases = []
    wanted = demands(expected)
    for each, called in zip((primary, *replicas), names(shard), strict=True):
        room = _room(each.server) // options.poolers
        sizes = shares(room, [wanted[name] for name, _ in _purposes(called)])
        for (purpose, name), size in zip(_purposes(called), sizes, strict=True):
            databases.append(
                PooledDatabase(
                    name, each.url.host or "", each.url.port or 5432, each.url.database or "",
                    is_read_only=purpose != "write", size=size,
                )
            )  # fmt: skip
    here = folder / shard.name
    address = shard.primary.url
    is_pooled = shard.pooler is not None
    clients = expected.writers_pools + len(replicas) * expected.readers_pools
    settings = PoolerSettings(
        databases=databases,
        listen_addr=options.listen_addr or (address.host if is_pooled else None) or "127.0.0.1",
        port=(address.port if is_pooled else None) or options.port,
        sockets=options.sockets or str(here),
        userlist=str(here / "userlist.txt"),
        stats_users=[shard.looking_url.username or ""],
        version=shard.pooler.version if shard.pooler else (),
        # A quarter more, for programs that are being replaced.
        max_clients=max(100, clients * expected.processes * 5 // 4),
        auth_user=options.auth_user,
        auth_query=options.auth_query if options.auth_user else "",
        settings={**tls_settings(options), **options.settings},
    )
    silent = tuple(_address(each.url) for each in seen if each.server is None)
    passwords = _passwords(shard, options, logins)
    return Rendered(
        shard.name,
        render_ini(settings),
        Secret(render_userlist(passwords)),
        tuple(databases),
        silent,
    )


def names(shard: PhysicalShard) -> list[tuple[str, str]]:
    """Return what clients ask for: for the primary to write and to read, then for each replica.

    Behind a pooler it is what the addresses of the file say; else what they would be there.
    """
    database = shard.primary.url.database or ""
    if shard.pooler is None:
        replicas = [f"{database}_{n}" for n in range(1, len(shard.replicas) + 1)]
        return [(database, f"{database}_read"), *(("", name) for name in replicas)]
    reader = shard.primary.read_url
    own = (database, (reader.database or "") if reader else "")
    return [own, *(("", each.url.database or "") for each in shard.replicas)]


def placed(seen: Sequence[Seen]) -> list[Seen]:
    """Return servers with the primary of now first, the others in their order.

    Where none says that it takes writes, or several do, the configured one is the primary: who is
    right then is not for a pooler to decide.
    """
    takes_writes = [each for each in seen if each.server and not each.server.is_replica]
    if len(takes_writes) != 1:
        return list(seen)
    (primary,) = takes_writes
    return [primary, *(each for each in seen if each is not primary)]


def demands(expected: Expected) -> dict[str, int]:
    """Return how many connections the pools of all processes may open to a server, by purpose.

    Each replica may have to serve all readers, when the others are away.
    """
    readers = expected.pool * expected.processes
    return {
        "write": expected.writers_pools * expected.processes - readers,
        "read": readers + expected.processes,
    }


def shares(room: int, wanted: Sequence[int]) -> list[int]:
    """Divide the connections of a server: as many as wanted, or in proportion; two at least."""
    total = sum(wanted)
    if total <= room:
        return [max(_LEAST, each) for each in wanted]
    return [max(_LEAST, each * room // total) for each in wanted]


def _purposes(called: tuple[str, str]) -> list[tuple[str, str]]:
    write, read = called
    return [pair for pair in (("write", write), ("read", read)) if pair[1]]


def _room(server: Server | None) -> int:
    if server is None:
        return _DEFAULT_MAX - KEPT
    reserved = server.number("superuser_reserved_connections")
    return max(0, server.number("max_connections") - reserved - KEPT)


def server_url(shard: PhysicalShard, endpoint: Endpoint) -> URL:
    """Return the address of PostgreSQL itself."""
    if shard.pooler is None:
        return endpoint.url
    if endpoint.role is Role.PRIMARY:
        return shard.admin_url.set(username=endpoint.url.username, password=endpoint.url.password)
    if endpoint.server_url is None:
        raise ConfigurationError(
            f"physical shard {shard.name!r}: where the server of replica "
            f"{endpoint.url.database!r} is, behind its pooler, is not known",
            hint='write replicas = [{ url = "…", server = "postgresql://host:5432/database" }]',
        )
    return endpoint.server_url.set(username=endpoint.url.username, password=endpoint.url.password)


def _passwords(
    shard: PhysicalShard, options: PgBouncerConfig, logins: Mapping[str, str]
) -> dict[str, str]:
    # Who comes this way: sessions, relays, and who looks.
    urls = [shard.primary.url, shard.relay_url or shard.primary.url, shard.looking_url]
    known = {**{url.username or "": Secret(url.password or "") for url in urls}, **logins}
    wanted = (
        [options.auth_user]
        if options.auth_user
        else list(dict.fromkeys(url.username or "" for url in urls))
    )
    for name in wanted:
        if not known.get(name):
            raise ConfigurationError(
                f"the password of {name!r} is not known",
                hint="set SHARDKIT_POOLER_PASSWORD for pgbouncer.auth_user, or write it into "
                "the address in shardkit.toml",
            )
    return {name: known[name] for name in wanted}


def tls_settings(options: PgBouncerConfig) -> dict[str, str]:
    """Return the settings of TLS: required of clients, and servers verified, where it is set up."""
    found = {
        "client_tls_sslmode": "require" if options.client_tls_cert else "",
        "client_tls_cert_file": options.client_tls_cert,
        "client_tls_key_file": options.client_tls_key,
        "client_tls_ca_file": options.client_tls_ca,
        "server_tls_sslmode": "verify-full" if options.server_tls_ca else "",
        "server_tls_ca_file": options.server_tls_ca,
    }
    return {key: value for key, value in found.items() if value}


def _address(url: URL) -> str:
    return f"{url.host}:{url.port or 5432}/{url.database}"


def changed(rendered: Rendered, folder: Path) -> list[str]:
    """Return which files of a physical shard are not what they should be, and how they are called.

    A list of logins that others may read counts as changed.
    """
    here = folder / rendered.physical
    found = []
    for name, text in (("pgbouncer.ini", rendered.ini), ("userlist.txt", rendered.userlist)):
        file = here / name
        try:
            is_same = file.read_text(encoding="utf-8") == text
            is_open = name == "userlist.txt" and bool(stat.S_IMODE(file.stat().st_mode) & 0o077)
        except (FileNotFoundError, UnicodeDecodeError):
            is_same = is_open = False
        except OSError as error:
            raise ConfigurationError(f"{file}: cannot be read: {error.strerror}") from error
        if not is_same or is_open:
            found.append(name)
    return found


def write(rendered: Rendered, folder: Path, *, owner: str | None = None) -> None:
    """Write the files of a physical shard that differ, each whole or not at all.

    Args:
        rendered: the files.
        folder: in which the physical shard has its own.
        owner: user who runs PgBouncer, who gets the list of logins; None for this user.

    Raises:
        ConfigurationError: the folder cannot be written, or there is no such user.
    """
    here = folder / rendered.physical
    texts = {"userlist.txt": (rendered.userlist, 0o600), "pgbouncer.ini": (rendered.ini, 0o644)}
    try:
        user = None if owner is None else pwd.getpwnam(owner)
        here.mkdir(parents=True, exist_ok=True)
        for name in changed(rendered, folder):
            text, mode = texts[name]
            replace_file(here / name, text, mode, user)
    except KeyError:
        raise ConfigurationError(f"no user {owner!r}", hint="correct --owner") from None
    except OSError as error:
        raise ConfigurationError(f"{here}: cannot be written: {error.strerror}") from error
