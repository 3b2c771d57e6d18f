"""Remembers the plans of statements over every logical shard, so that they are decided once.

A plan is pure, so a statement of the same structure with the same values has the same one. The
structure is SQLAlchemy's cache key, by which it keeps compiled SQL as well; the values have to be
of types whose equal values are the same value, and everything that the key leaves out has to be
absent. Only statements that name no key at all are remembered: where others go may change.

Source: SQLAlchemy's documentation, "SQL Compilation Caching".
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final

from sqlalchemy import Select
from sqlalchemy.orm import Load
from sqlalchemy.util import LRUCache

from shardkit.gather import Plan
from shardkit.statements import AllShards, Params

__all__ = ["Plans", "key_of"]

_SIZE: Final = 128
"""Plans that are kept, and half as many again before the oldest go."""

_PLAIN: Final = frozenset({int, bool, str, bytes, type(None)})
"""Types of which values that compare equal are sent, and shown, alike: -0.0 is not 0.0, and two
times that are equal may lie in two zones."""


def key_of(statement: Any, params: Params) -> Hashable | None:
    """Return what statements with one plan have in common; None for what is not remembered.

    Args:
        statement: what is asked.
        params: the values passed with it.
    """
    if params or type(statement) is not Select or statement._execution_options:
        return None
    options = statement._with_options
    if not all(isinstance(option, AllShards | Load) for option in options):
        return None  # what else an option says goes with the plan's statement, not with its key
    found = statement._generate_cache_key()
    if found is None or found.params:
        return None
    values = []
    for bind in found.bindparams:
        if bind.callable is not None or type(bind.value) not in _PLAIN:
            return None
        values.append((type(bind.value), bind.value, bind.required, bind.expanding))
    limits = tuple(option.payload for option in options if isinstance(option, AllShards))
    return (found.key, tuple(values), limits)


class Plans:
    """The plans of one cluster. Thread-safe."""

    def __init__(self) -> None:
        self._plans: LRUCache[Hashable, Plan] = LRUCache(_SIZE)

    def get(self, key: Hashable | None) -> Plan | None:
        """Return the plan of a key, if it is known."""
        return None if key is None else self._plans.get(key)

    def keep(self, key: Hashable | None, plan: Plan) -> None:
        """Remember the plan of a statement that goes to every logical shard whatever its values."""
        if key is not None:
            self._plans[key] = plan
