"""What SQL cannot do for a failover: stop a server, make one anew, reload poolers.

`CommandHost` runs the commands of `[failover]`; without them `NoHost` does nothing, and a failover
goes on without: the old primary is then told over SQL, where it answers. The embedded cluster has
one of its own (`shardkit.local.host`). Called by `shardkit.ops.failover.driver`.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence
from typing import Final, Protocol

from shardkit.config import FailoverConfig
from shardkit.errors import TryAgainError

__all__ = ["CommandHost", "Host", "NoHost", "host_of"]

_LOG: Final = logging.getLogger(__name__)

_SECONDS: Final = 10.0
"""That a command has to stop a server, or to reload poolers."""

_COPY: Final = 6 * 3600.0
"""Seconds that making a server anew may take: it may copy all of it."""


class Host(Protocol):
    """What may be done about servers from outside. Servers are named `host:port`."""

    @property
    def can_rejoin(self) -> bool:
        """Whether it can make standbys of servers."""

    @property
    def leads(self) -> bool:
        """Whether it looks after poolers."""

    def fence(self, physical: str, server: str) -> bool:
        """Stop a server; tell whether it surely does not run any more."""

    def rejoin(self, physical: str, server: str, primary: str, *, anew: bool = False) -> None:
        """Make a server a standby of the primary, and start it; it may still run.

        Args:
            physical: name of the physical shard.
            server: which one.
            primary: whose standby.
            anew: by a new copy: pg_rewind ended well, and did not help.
        """

    def lead(self, physical: str, primary: str) -> None:
        """Have poolers send to the primary."""


class NoHost:
    """Nothing can be done from outside."""

    can_rejoin = False
    leads = False

    def fence(self, physical: str, server: str) -> bool:
        """Say that nobody knows."""
        return False

    def rejoin(self, physical: str, server: str, primary: str, *, anew: bool = False) -> None:
        """Do nothing; never called."""

    def lead(self, physical: str, primary: str) -> None:
        """Do nothing; never called."""


class CommandHost:
    """Runs the commands of `[failover]`."""

    def __init__(self, config: FailoverConfig) -> None:
        self._config = config

    @property
    def can_rejoin(self) -> bool:
        """Whether there is a command for it."""
        return bool(self._config.rejoin)

    @property
    def leads(self) -> bool:
        """Whether there is a command for it."""
        return bool(self._config.lead)

    def fence(self, physical: str, server: str) -> bool:
        """Run `failover.fence`."""
        return bool(self._config.fence) and self._run(
            self._config.fence, physical, server, "", _SECONDS
        )

    def rejoin(self, physical: str, server: str, primary: str, *, anew: bool = False) -> None:
        """Run `failover.rejoin`.

        Raises:
            TryAgainError: it failed.
        """
        how = {"how": "copy" if anew else "rewind"}
        command = [_filled(word, how) for word in self._config.rejoin]
        if not self._run(command, physical, server, primary, _COPY):
            raise TryAgainError(
                f"{server}: failover.rejoin did not make it a standby of {primary}",
                hint="the log of the watcher has what the command said; it is run again",
            )

    def lead(self, physical: str, primary: str) -> None:
        """Run `failover.lead`."""
        self._run(self._config.lead, physical, primary, primary, _SECONDS)

    def _run(
        self, command: Sequence[str], physical: str, server: str, primary: str, seconds: float
    ) -> bool:
        values = {"physical": physical}
        for prefix, address in (("", server), ("primary_", primary)):
            host, _, port = address.rpartition(":")
            values |= {f"{prefix}host": host, f"{prefix}port": port}
        words = [_filled(word, values) for word in command]
        try:
            done = subprocess.run(  # noqa: S603  what the operator wrote
                words, check=False, capture_output=True, text=True, timeout=seconds,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            _LOG.warning("%s: %s", words[0], error)
            return False
        if done.returncode:
            _LOG.warning("%s exited with %d: %s", words[0], done.returncode, done.stderr.strip())
        return done.returncode == 0


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(f"{{{name}}}", value)
    return word


def host_of(config: FailoverConfig) -> Host:
    """Return what a configuration says can be done."""
    has_any = config.fence or config.rejoin or config.lead
    return CommandHost(config) if has_any else NoHost()
