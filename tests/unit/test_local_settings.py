"""The configuration files of an embedded cluster."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from shardkit.config import Config, PoolConfig
from shardkit.local.options import LocalOptions
from shardkit.local.settings import (
    PhysicalAddresses,
    host_rules,
    ident_map,
    postgres_conf,
    shardkit_toml,
)
from shardkit.topology import Pooler

PASSWORDS = {"shardkit_app": "a-p_p", "shardkit_admin": "a-d_m", "shardkit_replication": "r"}


def conf(options: LocalOptions, primary_conninfo: str | None = None) -> str:
    return postgres_conf(
        name="alpha_0",
        port=5501,
        sockets="/run",
        options=options,
        folder="/it's here",
        primary_conninfo=primary_conninfo,
    )


def toml(kept: dict[str, Any] | None = None) -> Config:
    text = shardkit_toml(
        logical_shards=4,
        physical=[
            PhysicalAddresses("alpha", "0-1", 5501, {"shardkit_1": 5502}),
            PhysicalAddresses("beta", "2-3", 5503),
        ],
        services={"redis": "redis://127.0.0.1:6379/0"},
        passwords=PASSWORDS,
        kept=kept,
    )
    return Config.model_validate(tomllib.loads(text))


def test_the_written_file_is_one_that_is_accepted() -> None:
    config = toml()
    assert config.physical[1].shard_numbers == (2, 3)
    assert (
        config.physical[0]
        .replica_configs[0]
        .url.get_secret_value()
        .endswith("@127.0.0.1:5502/shardkit")
    )
    assert config.services == {"redis": "redis://127.0.0.1:6379/0"}


def test_behind_a_pooler_applications_go_through_it_and_commands_do_not() -> None:
    text = shardkit_toml(
        logical_shards=4,
        physical=[
            PhysicalAddresses("alpha", "0-3", 5501, {"shardkit_1": 5502}, (6501, "1.18.0")),
        ],
        services={},
        passwords=PASSWORDS,
    )
    shard = Config.model_validate(tomllib.loads(text)).topology(Path()).physical["alpha"]
    assert [e.address for e in shard.endpoints] == [
        "127.0.0.1:6501/shardkit", "127.0.0.1:6501/shardkit_1",
    ]  # fmt: skip
    assert shard.primary.read_url is not None
    assert (shard.primary.read_url.port, shard.primary.read_url.database) == (6501, "shardkit_read")
    assert (shard.admin_url.port, shard.admin_url.username) == (5501, "shardkit_admin")
    assert shard.pooler == Pooler((1, 18, 0))


def test_tables_of_a_person_are_kept() -> None:
    pool = {"size": 9, "timeout": 0.5, "prepare_statements": False}
    config = toml({"pool": pool, "migrations": {"location": "app:migrations"}})
    assert config.pool == PoolConfig.model_validate(pool)
    assert config.migrations.location == "app:migrations"


def test_many_logical_shards_get_a_larger_lock_table() -> None:
    assert "max_locks_per_transaction = '256'" in conf(LocalOptions())
    assert "max_locks_per_transaction = '1024'" in conf(LocalOptions(logical_shards=1024))


def test_values_are_quoted_and_the_users_settings_win() -> None:
    text = conf(LocalOptions(settings={"fsync": "off", "work_mem": "1MB"}))
    assert "hba_file = '/it''s here/pg_hba.conf'" in text
    assert text.count("fsync = ") == 1
    assert "fsync = 'off'" in text
    assert "work_mem = '1MB'" in text


def test_only_a_replica_has_a_primary() -> None:
    assert "primary_conninfo" not in conf(LocalOptions())
    assert "primary_conninfo = 'host=x'" in conf(LocalOptions(), "host=x")


def test_nobody_is_trusted() -> None:
    rules = [line.split() for line in host_rules().splitlines() if line[0] != "#"]
    methods = {rule[3 if rule[0] == "local" else 4] for rule in rules}
    assert methods == {"peer", "scram-sha-256", "reject"}
    # The first rule that fits decides: the superuser is turned away before anybody is let in.
    by_network = [rule for rule in rules if rule[0] == "host"]
    refused = next(n for n, rule in enumerate(by_network) if rule[2] == "postgres")
    assert by_network[refused][4] == "reject"
    assert all("postgres" not in rule[2].split(",") for rule in by_network[:refused])
    assert all(rule[2] != "all" for rule in by_network[:refused])
    assert ident_map(("root", "root", "nobody")).count("owner") == 2
