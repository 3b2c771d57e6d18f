"""Makes objects of rows that no statement of SQLAlchemy's loaded: as loading them would have.

Source: `_instance` and `_populate_full` in `sqlalchemy/orm/loading.py`, of which this is what is
left for a new object of a class without inheritance, options and eager relationships.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import instance_dict, instance_state
from sqlalchemy.orm.loading import _new_runid

if TYPE_CHECKING:  # the `cache` extra
    from shardkit.cached import CachePlan

__all__ = ["instance_of"]


def instance_of(session: Session, plan: CachePlan, values: Sequence[Any]) -> Any:
    """Return the object of a row, now in the session; the one it has already, if it has one.

    Args:
        session: gets it.
        plan: of its class.
        values: of the plan's columns.
    """
    mapper = plan.mapper
    manager = mapper.class_manager
    key = mapper.identity_key_from_primary_key(plan.identity(values))
    held = session.identity_map.get(key)
    if held is not None:  # loaded meanwhile
        return held
    instance = manager.new_instance()
    state: Any = instance_state(instance)
    state.key = key
    state.session_id = session.hash_key
    session.identity_map._add_unpresent(state, key)
    state.load_path = mapper._path_registry
    state.runid = _new_runid()
    instance_dict(instance).update(zip(plan.attributes, values, strict=True))
    if manager.dispatch.load:
        manager.dispatch.load(state, None)  # no query, as in `Session.merge(load=False)`
    if session.dispatch.loaded_as_persistent:
        session.dispatch.loaded_as_persistent(session, state)
    if state.modified:  # by a listener
        state._commit_all(instance_dict(instance), session.identity_map)
    return instance
