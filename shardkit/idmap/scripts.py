"""What the server runs, and how commands are told to run it. No I/O.

Each script touches one key, so that a map works on a Redis Cluster, and does its work or none of
it: a reader never sees half a change, and of two writers one is told to look again. Bytes are
compared, never understood, by the server: the format has one implementation (`blocks`).

Source: Redis manual, "Scripting with Lua", "Atomicity".
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

__all__ = ["READ", "SWAP", "SWAP_ROWS", "Command", "call", "is_change", "with_source"]

Command = tuple[Any, ...]

READ: Final = b"""
local key, found = KEYS[1], {redis.call('GETRANGE', KEYS[1], 0, 7)}
local kind, width = string.byte(found[1], 4, 5)
if kind == 1 then
  local size = 4 + 64 * width
  for n = 2, #ARGV do
    local at = 8 + ARGV[n] * size
    found[n] = redis.call('GETRANGE', key, at, at + size - 1)
  end
elseif kind == 2 then
  local first = 8 + 2 * ARGV[1]
  for n = 2, #ARGV do
    local ends = redis.call('GETRANGE', key, 6 + 2 * ARGV[n], 9 + 2 * ARGV[n])
    local a, b, c, d = string.byte(ends, 1, 4)
    if not d then return {found[1]} end
    local from, to = ARGV[n] == '0' and 0 or a * 256 + b, c * 256 + d
    found[n] = to > from and redis.call('GETRANGE', key, first + from, first + to - 1) or ''
  end
elseif kind == 3 then
  found[2] = redis.call('GETRANGE', key, 8, -1)
end
return found
"""
"""Rows of a block: rows of the layout, then which. Head first; of a list everything behind it."""

SWAP: Final = b"""
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
if ARGV[2] == '' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], ARGV[2]) end
return 1
"""
"""A whole block in place of another: before, after; nothing stands for no block."""

SWAP_ROWS: Final = b"""
local key = KEYS[1]
for n = 1, #ARGV, 3 do
  if redis.call('GETRANGE', key, ARGV[n], ARGV[n] + #ARGV[n + 1] - 1) ~= ARGV[n + 1] then
    return 0
  end
end
for n = 1, #ARGV, 3 do redis.call('SETRANGE', key, ARGV[n], ARGV[n + 2]) end
return 1
"""
"""Rows in place of others, all or none; of each its offset, bytes before, bytes after.

The check in a row is of its block's head as well: the same bytes are of the same encoding."""

_SOURCES: Final = {
    hashlib.sha1(text).hexdigest().encode(): text  # noqa: S324  Redis names scripts so
    for text in (READ, SWAP, SWAP_ROWS)
}
_NAMES: Final = {text: name for name, text in _SOURCES.items()}


def call(script: bytes, key: bytes, *arguments: bytes | int) -> Command:
    """Return the command that runs a script on a key."""
    return ("EVALSHA", _NAMES[script], 1, key, *arguments)


def with_source(command: Command) -> Command:
    """Return a command with the script itself in place of its name, which the server lacks."""
    return ("EVAL", _SOURCES[command[1]], *command[2:])


def is_change(command: Command) -> bool:
    """Tell whether a command may change something."""
    kind, name = command[:2]
    return kind == "SET" or (kind == "EVALSHA" and bool(name != _NAMES[READ]))
