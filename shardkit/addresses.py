"""Makes the addresses of a physical shard: what `shardkit.toml` says, with logins and TLS.

One truth for who connects as whom: sessions as the application, commands as the migrator, the
relay, the mover and the monitor as themselves, each as the application or the admin where it has
no login of its own. Called by `shardkit.config`; opens no connection.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import SecretStr
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from shardkit.errors import ConfigurationError
from shardkit.logins import AdminLogin, Login, RolesConfig, TlsConfig
from shardkit.secret import Secret
from shardkit.sections import PhysicalConfig
from shardkit.topology import Endpoint, PhysicalShard, Role, RoleNames

__all__ = ["Addresses"]

DRIVER: Final = "postgresql+psycopg"


class Addresses:
    """What is the same for every physical shard: logins and TLS, their files read once.

    Args:
        admin: `[admin]`.
        roles: `[roles]`.
        tls: `[tls]`.
        folder: where relative files are looked up.

    Raises:
        ConfigurationError: a file is missing, unreadable or open to others.
    """

    def __init__(self, admin: AdminLogin, roles: RolesConfig, tls: TlsConfig, folder: Path) -> None:
        self._roles = roles
        self._admin = admin
        self._tls = {
            is_pooled: tls.options(folder, is_pooled=is_pooled) for is_pooled in (False, True)
        }
        logins: list[tuple[str, Login | AdminLogin]] = [("admin", admin)]
        logins += list(roles.logins)
        self._secrets = {duty: login.secret(folder, duty) for duty, login in logins}
        self._certificates = {
            duty: login.certificate(folder, "admin" if duty == "admin" else f"roles.{duty}")
            for duty, login in logins
        }

    def shard(self, shard: PhysicalConfig) -> PhysicalShard:
        """Return one physical shard.

        Raises:
            ConfigurationError: an address cannot be read.
        """
        key = f"physical.{shard.name}"
        is_pooled = shard.pooler is not None

        def app(secret: SecretStr, place: str, *, is_pooled: bool = is_pooled) -> URL:
            return self._app(secret, f"{key}.{place}", is_pooled=is_pooled)

        primary = app(shard.primary, "primary")
        straight = app(shard.admin, "admin", is_pooled=False) if shard.admin else primary
        users = {duty: self._roles.user(duty) for duty, _ in self._roles.logins}
        admin_name = self._admin.user
        names = RoleNames(
            owner=self._roles.owner_or(admin_name),
            app=primary.username or "",
            admin=admin_name,
            migrator=users.get("migrator") or admin_name,
            mover=users.get("mover") or users.get("migrator") or admin_name,
            relay=users.get("relay") or primary.username or "",
            monitor=users.get("monitor") or users.get("migrator") or admin_name,
        )
        if (duty := self._shared(names)) is not None:
            raise ConfigurationError(
                f"roles.{duty}: {getattr(names, duty)!r} is the application of {key} already; "
                "each has a name of its own, or is left out"
            )
        return PhysicalShard(
            name=shard.name,
            primary=Endpoint(
                shard.name,
                Role.PRIMARY,
                primary,
                app(shard.reader, "reader") if shard.reader else None,
            ),
            replicas=tuple(
                Endpoint(
                    shard.name,
                    Role.REPLICA,
                    app(replica.url, f"replicas[{n}]"),
                    region=replica.region,
                    standby=replica.standby,
                    server_url=None
                    if replica.server is None
                    else app(replica.server, "replicas.server", is_pooled=False),
                )
                for n, replica in enumerate(shard.replica_configs)
            ),
            admin_url=self._as("migrator" if "migrator" in users else "admin", straight),
            pooler=shard.pooler_in_front,
            relay_url=self._as("relay", primary) if "relay" in users else None,
            monitor_url=self._as("monitor", straight) if "monitor" in users else None,
            mover_url=self._as("mover", straight) if "mover" in users else None,
            control_url=self._as("admin", straight),
            named_roles=names,
        )

    def _shared(self, names: RoleNames) -> str | None:
        """Return which duty with a login of its own has the application's name."""
        for duty, _ in self._roles.logins:
            if duty != "app" and getattr(names, duty) == names.app:
                return duty
        return "owner" if self._roles.owner == names.app else None

    def _as(self, duty: str, url: URL) -> URL:
        """Return an address with another login."""
        name = self._admin.user if duty == "admin" else self._roles.user(duty)
        query = {**url.query, **self._certificates[duty]}
        # `set` takes None for "as it was".
        return url.set(username=name, query=query)._replace(password=self._secrets[duty])

    def _app(self, secret: SecretStr, place: str, *, is_pooled: bool) -> URL:
        """Return an address with the login of sessions, and TLS where it does not say itself."""
        url = _url(secret, place)
        name = self._roles.user("app")
        if url.username is None and name is None:
            raise _incomplete(place)
        if url.username is not None and name is not None and url.username != name:
            raise ConfigurationError(
                f"{place}: says user {url.username!r}, and roles.app.user {name!r}; leave one out"
            )
        password = url.password or self._secrets.get("app")
        query = {**self._tls[is_pooled], **self._certificates.get("app", {}), **url.query}
        return url.set(username=url.username or name, query=query)._replace(
            password=None if password is None else Secret(password)
        )


def _url(secret: SecretStr, place: str) -> URL:
    try:
        url = make_url(secret.get_secret_value())
    except (ArgumentError, ValueError):
        url = None
    if url is None:  # not while the error is handled, whose text has the address
        raise ConfigurationError(
            f"{place}: not an address; write postgresql://user:password@host:port/database"
        )
    if url.get_backend_name() != "postgresql" or not (url.host and url.database):
        raise _incomplete(place)
    return url.set(drivername=DRIVER)


def _incomplete(place: str) -> ConfigurationError:
    return ConfigurationError(
        f"{place}: must be postgresql:// with user, host and database, all of them"
    )
