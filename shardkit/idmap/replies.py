"""What replies of Redis that are no answers mean, as shardkit's errors. No I/O."""

from __future__ import annotations

from typing import Any, Final

from redis import exceptions

from shardkit.errors import (
    ConfigurationError,
    DamagedMapError,
    EndpointUnavailableError,
    IdMapError,
    IdMapFullError,
    OutcomeUnknownError,
    ShardkitError,
)

__all__ = ["FAILURES", "LOST", "NoScript", "bytes_of", "wrong"]

NoScript: Final = exceptions.NoScriptError

_LOGIN: Final = (
    exceptions.AuthenticationError,
    exceptions.AuthorizationError,
    exceptions.NoPermissionError,
)
_REFUSED: Final = (
    exceptions.BusyLoadingError,
    exceptions.ClusterDownError,
    exceptions.MasterDownError,
    exceptions.MaxConnectionsError,
    exceptions.ReadOnlyError,
    exceptions.SlotNotCoveredError,
    exceptions.TryAgainError,
)
"""Said by a server, or by the client before it sent anything: nothing was done."""
LOST: Final = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.RedisClusterException,
    OSError,
)
"""The answer did not come, whatever was done."""
FAILURES: Final = (exceptions.RedisError, *LOST)
"""What a client raises for the server's sake."""


def bytes_of(reply: Any, key: bytes) -> bytes:
    """Return the bytes of a reply; none for a key that does not exist."""
    if type(reply) is bytes:
        return reply
    if reply is None:
        return b""
    if isinstance(reply, Exception):
        raise wrong(reply, key)
    raise ConfigurationError(
        f"the client of an id map returns {type(reply).__name__} for bytes",
        hint="make it without decode_responses",
    )


def wrong(error: Exception, key: bytes | None, *, is_change: bool = False) -> ShardkitError:
    """Return what to raise for an error of Redis; its cause is set.

    Args:
        error: as redis-py raised or returned it.
        key: which key it is about, if about one.
        is_change: whether the command may have changed something.
    """
    found = _meaning(error, "" if key is None else key.decode(), is_change=is_change)
    found.__cause__ = error
    return found


def _meaning(error: Exception, key: str, *, is_change: bool) -> ShardkitError:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, _LOGIN):
        return ConfigurationError(
            f"Redis does not let this program use the id map: {said}",
            hint="it needs GET, GETRANGE, SET, SETRANGE, DEL, EVAL and EVALSHA on shardkit:idmap:*",
        )
    refused = isinstance(error, _REFUSED) or isinstance(error.__context__, ConnectionRefusedError)
    if refused or (isinstance(error, LOST) and not is_change):
        return EndpointUnavailableError(f"Redis does not answer for the id map: {said}")
    if isinstance(error, LOST):
        return OutcomeUnknownError(
            f"the answer of Redis to a change of the id map was lost: {said}",
            hint="make the change again: twice does no harm",
        )
    if isinstance(error, exceptions.OutOfMemoryError):
        return IdMapFullError(
            f"Redis takes no more entries: {said}",
            hint="raise maxmemory, or remove something else; what was set stays readable",
        )
    if said.startswith("WRONGTYPE") or "WRONGTYPE" in said:
        return DamagedMapError(
            f"{key} is no block of an id map",
            hint="delete that key and load its ids again",
        )
    return IdMapError(f"Redis refused a command on {key or 'the id map'}: {said}")
