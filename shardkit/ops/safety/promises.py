"""What the runner promises, and no revision may break: these cannot be set aside.

One transaction per step with its ledger row, names resolved in one logical shard's schema only,
every wait for a lock bounded.
"""

from __future__ import annotations

import re

import postgast

from shardkit.ops.safety.rules import Found, Scene, commands, rule
from shardkit.ops.sqltree import Statement, nodes

__all__: list[str] = []

_SETTINGS = {
    "search_path", "role", "session_authorization", "lock_timeout", "statement_timeout",
    "synchronous_commit", "session_replication_role", "transaction_read_only",
}  # fmt: skip
_OWN = re.compile(r"^(shard_\d{4}|shardkit)$")
_PER_SERVER = {
    "vacuum_stmt", "alter_system_stmt", "createdb_stmt", "dropdb_stmt", "alter_database_stmt",
    "alter_database_set_stmt", "alter_database_refresh_coll_stmt", "create_table_space_stmt",
    "drop_table_space_stmt", "alter_table_space_options_stmt", "create_role_stmt",
    "alter_role_stmt", "alter_role_set_stmt", "drop_role_stmt", "check_point_stmt",
    "create_subscription_stmt", "drop_subscription_stmt", "create_extension_stmt",
    "alter_extension_stmt", "alter_extension_contents_stmt", "create_publication_stmt",
    "alter_publication_stmt", "create_event_trig_stmt", "alter_event_trig_stmt", "load_stmt",
    "create_fdw_stmt", "create_foreign_server_stmt", "create_user_mapping_stmt",
}  # fmt: skip


@rule(
    "controls the transaction",
    "the runner commits each step together with its ledger row; split the revision. An index that "
    "is built CONCURRENTLY needs no autocommit_block()",
    "promise",
    squawk=("transaction-nesting", "ban-uncommitted-transaction",
            "ban-concurrent-index-creation-in-transaction"),
)  # fmt: skip
def transaction_control(statement: Statement, _scene: Scene) -> Found:
    """Refuse BEGIN, COMMIT, SAVEPOINT and their kin."""
    if statement.kind == "transaction_stmt":
        yield None


@rule(
    "cannot run once per logical shard inside a transaction",
    "run it once per server, outside the migrations",
    "promise",
    squawk=("ban-drop-database", "ban-drop-extension"),
)
def per_server(statement: Statement, _scene: Scene) -> Found:
    """Refuse what concerns a whole server or database."""
    if statement.kind in _PER_SERVER or (
        statement.kind == "drop_stmt"
        and statement.body.get("remove_type")
        in {"OBJECT_EXTENSION", "OBJECT_PUBLICATION", "OBJECT_EVENT_TRIGGER", "OBJECT_FDW"}
    ):
        yield None


@rule(
    "works CONCURRENTLY on what the runner cannot resume",
    "detach or reindex by hand, once per server, or rebuild the index under a new name with "
    "CREATE INDEX CONCURRENTLY; those are cleaned up after a crash, these are not",
    "promise",
    squawk=("require-concurrent-reindex", "require-concurrent-partition-detach"),
)
def concurrently_not_resumable(statement: Statement, _scene: Scene) -> Found:
    """Refuse REINDEX and DETACH PARTITION CONCURRENTLY, and several objects at once."""
    if statement.kind == "reindex_stmt" and any(
        node.get("defname") == "concurrently" for node in nodes(statement.body, "def_elem")
    ):
        yield None
    for _, command in commands(statement, "AT_DetachPartition"):
        if command["def"]["partition_cmd"].get("concurrent"):
            yield None
    if (
        statement.kind == "drop_stmt"
        and statement.body.get("concurrent")
        and len(statement.body["objects"]) > 1
    ):
        yield None


@rule(
    "builds an index CONCURRENTLY without a name",
    "name it: the runner finds what a crash leaves behind by its name",
    "promise",
)
def concurrent_index_without_name(statement: Statement, _scene: Scene) -> Found:
    """Refuse CREATE INDEX CONCURRENTLY ON t."""
    if (
        statement.kind == "index_stmt"
        and statement.body.get("concurrent")
        and not statement.body.get("idxname")
    ):
        yield None


@rule(
    "changes a setting the runner relies on",
    "the runner sets search_path and the timeouts; leave the statement out",
    "promise",
    squawk=("require-timeout-settings",),
)
def runner_setting(statement: Statement, _scene: Scene) -> Found:
    """Refuse SET search_path, ROLE, the timeouts, and RESET ALL."""
    body = statement.body
    if statement.kind == "variable_set_stmt" and (
        body.get("kind") == "VAR_RESET_ALL" or body.get("name") in _SETTINGS
    ):
        yield None
    if statement.kind == "discard_stmt":
        yield None
    if statement.kind in {"create_function_stmt", "do_stmt"}:
        return  # a function may set what it likes while it runs
    for call in nodes(body, "func_call"):
        name = call["funcname"][-1]["string"]["sval"]
        first = next(nodes(call.get("args", [])[:1], "sval"), {})
        if name == "set_config" and first.get("sval") in _SETTINGS:
            yield None


@rule(
    "changes a schema",
    "schemas belong to shardkit; name tables without a schema",
    "promise",
    squawk=("ban-drop-schema", "ban-set-schema"),
    strong=("renaming_schema",),
)
def schema_change(statement: Statement, _scene: Scene) -> Found:
    """Refuse CREATE, DROP and ALTER SCHEMA, and SET SCHEMA."""
    body = statement.body
    if (
        statement.kind in {"create_schema_stmt", "alter_object_schema_stmt"}
        or (statement.kind == "drop_stmt" and body.get("remove_type") == "OBJECT_SCHEMA")
        or (statement.kind == "rename_stmt" and body.get("rename_type") == "OBJECT_SCHEMA")
        or (statement.kind == "alter_owner_stmt" and body.get("object_type") == "OBJECT_SCHEMA")
    ):
        yield None


@rule(
    "names the schema of one logical shard",
    "name tables without a schema; the runner puts each logical shard's before them",
    "promise",
    squawk=("require-table-schema",),
)
def one_logical_shard(statement: Statement, _scene: Scene) -> Found:
    """Refuse `shard_0042.t` and what is shardkit's own."""
    tokens = [
        statement.text.encode()[token.start : token.end].decode().strip('"')
        for token in postgast.scan(statement.text).tokens
    ]
    for before, name, dot in zip(["", *tokens], tokens, tokens[1:], strict=False):
        if dot == "." and before != "." and _OWN.match(name):
            yield None
            return


@rule(
    "reads from standard input",
    "use INSERT; the runner sends statements only",
    "promise",
)
def copy_from_stdin(statement: Statement, _scene: Scene) -> Found:
    """Refuse COPY without a file or a program."""
    if statement.kind == "copy_stmt" and not statement.body.get("filename"):
        yield None


@rule(
    "has a name that PostgreSQL cuts off",
    "keep names within 63 bytes: two that differ only after that are one",
    "promise",
    squawk=("identifier-too-long",),
)
def name_too_long(statement: Statement, _scene: Scene) -> Found:
    """Refuse identifiers of more than 63 bytes."""
    for token in postgast.scan(statement.text).tokens:
        raw = statement.text.encode()[token.start : token.end]
        if raw[:1] != b"'" and not raw.startswith((b"--", b"/*", b"$")) and _is_name(raw):
            yield None
            return


def _is_name(raw: bytes) -> bool:
    is_word = raw[:1].isalpha() or raw[:1] in {b"_", b'"'} or raw[0] > 127
    return is_word and b"'" not in raw and len(raw.strip(b'"')) > 63
