"""What a bucket holds, which bucket a request takes from, and what clients are told. No I/O.

A bucket holds up to `n` tokens and is full again after `seconds`; a request takes one. What is
counted is the address a request comes from: a log-in that was not checked yet proves nothing, and
whoever could choose their own name would choose a new one each time.
"""

from __future__ import annotations

import ipaddress
import math
import re
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import BeforeValidator, PlainSerializer

from app.addresses import API, MEDIA

__all__ = ["CLOSED", "Group", "Rate", "RateText", "Taken", "client_of", "group_of", "headers_of"]

Group = Literal["sign_ups", "log_ins", "log_in_failures", "heavy", "writes", "reads"]

CLOSED: Final[frozenset[Group]] = frozenset({"sign_ups", "log_ins", "log_in_failures"})
"""Groups that are refused while Redis does not answer: guesses of passwords must be counted."""

_PREFIX_6: Final = 64
"""Bits of an IPv6 address that name a customer; the rest is theirs to choose (RFC 6177)."""

_FREE: Final = (f"{MEDIA}/", "/static/", "/healthz", "/readyz", "/metrics")
"""Never limited: what edges cache, and what operators ask."""

_GROUPS: Final[dict[tuple[str, str], Group]] = {
    ("POST", f"{API}/users"): "sign_ups",
    ("POST", "/signup"): "sign_ups",
    ("POST", f"{API}/sessions"): "log_ins",
    ("POST", "/login"): "log_ins",
    ("PUT", f"{API}/me/password"): "log_ins",
    ("POST", "/settings/password"): "log_ins",
    ("POST", f"{API}/me/deletion"): "log_ins",
    ("POST", "/settings/delete"): "log_ins",
    ("POST", f"{API}/photos"): "heavy",
    ("POST", "/upload"): "heavy",
    ("POST", f"{API}/me/exports"): "heavy",
    ("POST", "/settings/export"): "heavy",
}

_RATE: Final = re.compile(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,5})", re.ASCII)


class Rate(NamedTuple):
    """The size of a bucket.

    Attributes:
        n: tokens of a full one.
        seconds: until an empty one is full.
    """

    n: int
    seconds: int

    @property
    def microseconds(self) -> int:
        """Time until a token comes back."""
        return max(1, self.seconds * 1_000_000 // self.n)


class Taken(NamedTuple):
    """What became of an attempt to take a token.

    Attributes:
        is_allowed: whether there was one.
        left: tokens that are left.
        retry_after: seconds until there is one; 0 when there was.
        reset_after: seconds until the bucket is full.
    """

    is_allowed: bool
    left: int
    retry_after: float
    reset_after: float


def _read(value: Any) -> Any:
    if isinstance(value, str):
        if value == "off":
            return None
        if (found := _RATE.fullmatch(value)) is None:
            raise ValueError('must be "requests/seconds", such as "300/60", or "off"')
        return Rate(int(found[1]), int(found[2]))
    return value


RateText = Annotated[
    Rate | None,
    BeforeValidator(_read),
    PlainSerializer(lambda rate: "off" if rate is None else f"{rate.n}/{rate.seconds}"),
]
"""A rate as operators write it: `"300/60"` is 300 at once, and 300 in any minute after that."""


def group_of(method: str, path: str) -> Group | None:
    """Return the bucket that a request takes from, or None where nothing is limited."""
    if path.startswith(_FREE):
        return None
    if (group := _GROUPS.get((method, path.rstrip("/") or "/"))) is not None:
        return group
    return "reads" if method in {"GET", "HEAD", "OPTIONS"} else "writes"


def client_of(host: str) -> str:
    """Return who is counted: an IPv4 address, or the network of an IPv6 one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host or "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address), _PREFIX_6), strict=False))
    return str(address)


def headers_of(group: Group, rate: Rate, taken: Taken) -> dict[str, str]:
    """Return what a client is told of its bucket.

    Source: draft-ietf-httpapi-ratelimit-headers-10, sections 3 and 4.
    """
    told = {
        "ratelimit-policy": f'"{group}";q={rate.n};w={rate.seconds}',
        "ratelimit": f'"{group}";r={taken.left};t={math.ceil(taken.reset_after)}',
    }
    if not taken.is_allowed:
        told["retry-after"] = str(max(1, math.ceil(taken.retry_after)))
    return told
