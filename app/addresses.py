"""Where things are: the parts of addresses that more than one module has to know."""

from __future__ import annotations

__all__ = ["API", "MEDIA"]

API = "/api/v1"
"""Prefix of the JSON interface; the number changes only with answers old clients cannot read."""

MEDIA = "/media"
"""Prefix of pictures."""
