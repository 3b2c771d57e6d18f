"""PgBouncer's files as text: sizes, names, quoting."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
from sqlalchemy import make_url

from shardkit.config import PgBouncerConfig
from shardkit.errors import ConfigurationError
from shardkit.ops.health.facts import Expected, Server
from shardkit.ops.pgbouncer import PooledDatabase, PoolerSettings, render_ini, render_userlist
from shardkit.ops.poolers import (
    Rendered,
    Seen,
    changed,
    demands,
    names,
    placed,
    shares,
    tls_settings,
    write,
)
from shardkit.topology import Endpoint, PhysicalShard, Pooler, Role, ShardMap, Topology

ADMIN = make_url("postgresql://admin:b@10.0.0.1:5432/shop")


def settings(**changes: object) -> PoolerSettings:
    values: dict[str, object] = {
        "databases": [PooledDatabase("shop", "10.0.0.1", 5432, "shop", size=7)],
        "port": 6432,
        "sockets": "/run/pgbouncer",
        "userlist": "/etc/pgbouncer/userlist.txt",
        "stats_users": ["admin"],
    }
    return PoolerSettings(**{**values, **changes})  # type: ignore[arg-type]


def read(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True, delimiters=("=",))
    parser.read_string(text)
    return parser


def endpoint(role: Role, url: str) -> Endpoint:
    return Endpoint("alpha", role, make_url(url))


def shard(pooler: Pooler | None = None) -> PhysicalShard:
    read_url = make_url("postgresql://app:a@10.0.0.1:6432/shop_ro") if pooler else None
    primary = Endpoint(
        "alpha", Role.PRIMARY, make_url("postgresql://app:a@10.0.0.1:5432/shop"), read_url
    )
    replica = endpoint(Role.REPLICA, "postgresql://app:a@10.0.0.2:5432/near")
    return PhysicalShard("alpha", primary, (replica,), ADMIN, pooler)


def server(*, is_replica: bool) -> Server:
    return Server("x", "alpha", Role.PRIMARY, is_replica, 180_000, {})


def seen(port: int, *, is_replica: bool | None) -> Seen:
    url = make_url(f"postgresql://app@h:{port}/shop")
    return Seen(url, None if is_replica is None else server(is_replica=is_replica))


def test_what_is_written_is_what_was_meant() -> None:
    reader = PooledDatabase("shop_read", "10.0.0.2", 5433, "shop", is_read_only=True)
    databases = [*settings().databases, reader]
    found = read(render_ini(settings(databases=databases, settings={"log_stats": "0"})))
    assert found["databases"]["shop"] == "host='10.0.0.1' port=5432 dbname='shop' pool_size=7"
    assert found["databases"]["shop_read"].endswith(
        "dbname='shop' connect_query='SET default_transaction_read_only = on'"
    )
    own = found["pgbouncer"]
    assert own["pool_mode"] == "transaction"
    assert own["auth_type"] == "scram-sha-256"
    assert own["stats_users"] == "admin"
    assert own["unix_socket_dir"] == "/run/pgbouncer"
    assert own["log_stats"] == "0"
    assert "admin_users" not in own, "commands come over the socket only"
    assert "auth_query" not in own


def test_settings_of_a_person_win_and_stand_once() -> None:
    text = render_ini(settings(settings={"query_wait_timeout": "9"}))
    assert text.count("query_wait_timeout") == 1
    assert "query_wait_timeout = 9\n" in text


@pytest.mark.parametrize(
    ("version", "carries"), [((1, 18, 0), 0), ((), 0), ((1, 21), 1), ((1, 24, 1), 1)]
)
def test_prepared_statements_are_carried_where_they_can_be(
    version: tuple[int, ...], carries: int
) -> None:
    assert render_ini(settings(version=version)).count("max_prepared_statements") == carries


def test_verifiers_may_be_asked_for() -> None:
    found = read(render_ini(settings(auth_user="asker", auth_query="SELECT 1")))
    assert found["pgbouncer"]["auth_user"] == "asker"
    assert found["pgbouncer"]["auth_query"] == "SELECT 1"


def test_tls_is_required_and_verified_where_there_are_certificates() -> None:
    options = PgBouncerConfig(
        client_tls_cert="/tls/a.crt", client_tls_key="/tls/a.key", server_tls_ca="/tls/ca.crt"
    )
    own = read(render_ini(settings(settings=tls_settings(options))))["pgbouncer"]
    assert own["client_tls_sslmode"] == "require"
    assert own["client_tls_cert_file"] == "/tls/a.crt"
    assert own["client_tls_key_file"] == "/tls/a.key"
    assert own["server_tls_sslmode"] == "verify-full"
    assert own["server_tls_ca_file"] == "/tls/ca.crt"
    assert "client_tls_ca_file" not in own
    assert tls_settings(PgBouncerConfig()) == {}


def test_hostile_names_stay_names() -> None:
    hostile = "a\" = host='evil"
    text = render_ini(settings(databases=[PooledDatabase(hostile, "it's", 1, "d'b; [x]")]))
    assert "\"a\"\" = host='evil\" = host='it''s' port=1 dbname='d''b; [x]'\n" in text
    assert text.count("\n[") == 2
    assert render_userlist({'a"b': 'p"\\ w'}) == '"a""b" "p""\\ w"\n'


@pytest.mark.parametrize(
    "broken",
    [
        {"databases": [PooledDatabase("a\nb", "h", 1, "d")]},
        {"databases": [PooledDatabase("a", "h\n[pgbouncer]\nauth_type=any", 1, "d")]},
        {"databases": [PooledDatabase("pgbouncer", "h", 1, "d")]},
        {"databases": [PooledDatabase("", "h", 1, "d")]},
        {"sockets": "/run\nauth_type = any"},
        {"settings": {"log_stats": "0\nauth_type = any"}},
        {"settings": {"x = 1\nauth_type": "any"}},
        {"settings": {"log_stats": " 0"}},
        {"stats_users": ["a\x00b"]},
    ],
)
def test_what_no_quoting_can_carry_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        render_ini(settings(**broken))
    assert caught.value.hint


def test_a_refused_password_is_not_shown() -> None:
    with pytest.raises(ConfigurationError) as caught:
        render_userlist({"app": "s3cret\n"})
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("room", "wanted", "expected"),
    [
        (100, [30, 10], [30, 10]),
        (100, [300, 100], [75, 25]),
        (100, [1, 1], [2, 2]),
        (0, [30, 10], [2, 2]),
        (10, [1000, 1], [9, 2]),
    ],
)
def test_a_server_is_divided_by_what_is_wanted(
    room: int, wanted: list[int], expected: list[int]
) -> None:
    assert shares(room, wanted) == expected


def test_what_is_wanted_grows_with_the_processes() -> None:
    topology = Topology("demo", {"alpha": shard()}, ShardMap(("alpha",), (1,)))
    one, ten = (demands(Expected(topology, pool=10, processes=n)) for n in (1, 10))
    assert one == {"write": 32, "read": 11}
    assert ten == {purpose: 10 * n for purpose, n in one.items()}


def test_names_are_those_of_the_file_behind_a_pooler() -> None:
    assert names(shard()) == [("shop", "shop_read"), ("", "shop_1")]
    assert names(shard(Pooler())) == [("shop", "shop_ro"), ("", "near")]


def test_names_lead_to_who_has_the_role() -> None:
    now = placed([seen(1, is_replica=None), seen(2, is_replica=False), seen(3, is_replica=True)])
    assert [each.url.port for each in now] == [2, 1, 3]
    unclear = [seen(1, is_replica=False), seen(2, is_replica=False)]
    assert placed(unclear) == unclear
    silent = [seen(1, is_replica=None), seen(2, is_replica=True)]
    assert placed(silent) == silent


def test_files_are_written_when_they_differ_and_kept_from_others(tmp_path: Path) -> None:
    found = Rendered("alpha", "ini\n", "logins\n", (), ())
    assert changed(found, tmp_path) == ["pgbouncer.ini", "userlist.txt"]
    write(found, tmp_path)
    logins, ini = tmp_path / "alpha" / "userlist.txt", tmp_path / "alpha" / "pgbouncer.ini"
    assert logins.stat().st_mode & 0o777 == 0o600
    assert changed(found, tmp_path) == []
    before = ini.stat().st_ino
    write(found, tmp_path)
    assert ini.stat().st_ino == before, "left alone"
    logins.chmod(0o644)
    assert changed(found, tmp_path) == ["userlist.txt"]
    write(found, tmp_path)
    assert logins.stat().st_mode & 0o777 == 0o600
    ini.write_text("edited\n")
    assert changed(found, tmp_path) == ["pgbouncer.ini"]
    assert [each.name for each in (tmp_path / "alpha").iterdir() if each.name[0] == "."] == []


def test_passwords_are_not_shown() -> None:
    assert "logins" not in repr(Rendered("alpha", "ini", "logins", (), ()))


def test_a_user_who_is_not_there_is_a_matter_of_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no user"):
        write(Rendered("alpha", "", "", (), ()), tmp_path, owner="nobody-of-this-name")


def test_the_table_of_the_file_is_checked() -> None:
    assert PgBouncerConfig().processes == 1
    with pytest.raises(ValueError, match="processes"):
        PgBouncerConfig(processes=0)
