"""shardkit.toml: what is accepted, and the one line that says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardkit.config import default_file, format_ranges, load, parse_ranges
from shardkit.errors import ConfigurationError
from shardkit.topology import Pooler

GOOD = """
[cluster]
name = "demo"
logical_shards = 8

[admin]
user = "adm"
password = "hunter2"

[[physical]]
name = "alpha"
logical_shards = "0-2, 7"
primary = "postgresql://app:hunter2@127.0.0.1:5501/demo"
replicas = ["postgresql://app:hunter2@127.0.0.1:5502/demo"]

[[physical]]
name = "beta"
logical_shards = "3-6"
primary = "postgresql://app:hunter2@127.0.0.1:5503/demo"

[services]
redis = "redis://127.0.0.1:6379/0"
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "shardkit.toml"
    file.write_text(text, encoding="utf-8")
    file.chmod(0o600)
    return file


def test_a_good_file_becomes_a_topology(tmp_path: Path) -> None:
    settings, topology = load(write(tmp_path, GOOD))
    assert topology.shard_map.owners == ("alpha",) * 3 + ("beta",) * 4 + ("alpha",)
    assert topology.shard_map.owned_by("alpha") == (0, 1, 2, 7)
    assert [e.address for e in topology.endpoints] == [
        "127.0.0.1:5501/demo", "127.0.0.1:5502/demo", "127.0.0.1:5503/demo",
    ]  # fmt: skip
    assert topology.physical["alpha"].admin_url.username == "adm"
    assert settings.services["redis"].startswith("redis://")
    assert "hunter2" not in f"{settings!r} {topology!r}"


def test_a_cache_is_at_the_servers_named_or_at_that_of_the_services(tmp_path: Path) -> None:
    settings, _ = load(write(tmp_path, GOOD))
    assert not settings.found_cache.is_on
    text = GOOD + '\n[cache]\nbackend = "redis"\n'
    settings, _ = load(write(tmp_path, text))
    assert settings.found_cache.nodes == ("redis://127.0.0.1:6379/0",)
    settings, _ = load(write(tmp_path, text + 'nodes = ["redis://b:1", "redis://c:1"]\n'))
    assert settings.found_cache.nodes == ("redis://b:1", "redis://c:1")
    assert settings.found_cache.timeout == 0.05


POOLED = GOOD.replace(
    '"3-6"\n', '"3-6"\npooler = "pgbouncer 1.24"\nadmin = "postgresql://adm@127.0.0.1:5503/demo"\n'
).replace('5503/demo"\n\n', '6432/demo"\nreader = "postgresql://app:hunter2@127.0.0.1:6432/r"\n\n')


def test_a_pooler_is_told_with_its_version(tmp_path: Path) -> None:
    settings, topology = load(write(tmp_path, POOLED))
    assert settings.pool.prepare_statements is None
    assert topology.physical["alpha"].pooler is None
    beta = topology.physical["beta"]
    assert beta.pooler == Pooler((1, 24))
    assert beta.admin_url.port == 5503
    assert beta.primary.read_url is not None
    assert beta.primary.read_url.database == "r"
    assert "hunter2" not in repr(topology)


@pytest.mark.parametrize(
    ("version", "carried"),
    [((), False), ((1, 18), False), ((1, 20, 9), False), ((1, 21), True), ((1, 24, 1), True)],
)
def test_prepared_statements_need_a_pooler_that_carries_them(
    version: tuple[int, ...], carried: bool
) -> None:
    assert Pooler(version).carries_prepared_statements is carried


BAD = [
    ("pooler without a direct address", "replicas = [", 'pooler = "pgbouncer"\nreplicas = [',
     "physical.0: admin: physical shard 'alpha' has a pooler; give the address"),
    ("another pooler", "replicas = [", 'pooler = "odyssey"\nreplicas = [', "physical.0.pooler"),
    ("a version that is none", "replicas = [", 'pooler = "pgbouncer new"\nreplicas = [',
     "physical.0.pooler"),
    ("a reader that is no address", "replicas = [", 'reader = "here"\nreplicas = [',
     "physical.alpha.reader: not an address"),
    ("unknown key", 'name = "demo"', 'name = "demo"\nlogical_shard = 8',
     "cluster.logical_shard: unknown key; did you mean 'logical_shards'"),
    ("misspelt table", "[services]", "[servces]", "servces: unknown key; did you mean 'services'"),
    ("misspelt pool key", "[services]", "[pool]\nsise = 3\n[services]",
     "pool.sise: unknown key; did you mean 'size'"),
    ("a cache of no known kind", "[services]", '[cache]\nbackend = "varnish"\n[services]',
     "cache.backend: Input should be 'memcached', 'redis', 'redis-cluster', 'memory' or 'none'"),
    ("a cache nowhere", "[services]", '[cache]\nbackend = "memcached"\n[services]',
     "cache.nodes: where is memcached? Name its servers here, or one under [services]"),
    ("a cache that may take long", "[services]",
     '[cache]\nbackend = "redis"\ntimeout = 0.2\n[services]', "cache.timeout: "),
    ("a Memcached that is a Redis", "[services]",
     '[cache]\nbackend = "memcached"\nnodes = ["redis://a:1"]\n[services]',
     "cache: nodes: 'redis://a:1' is no address; write host:port"),
    ("a Redis that is a Memcached", "[services]",
     '[cache]\nbackend = "redis"\ngutter = ["a:11211"]\n[services]',
     "cache: gutter: 'a:11211' is no Redis; write redis://host:port/0"),
    ("a port that is none", "[services]",
     '[cache]\nbackend = "memcached"\nnodes = ["a:99999"]\n[services]', "'a:99999' is no address"),
    ("one cache twice", "[services]",
     '[cache]\nbackend = "memcached"\nnodes = ["a:1"]\ngutter = ["a:1"]\n[services]',
     "cache: nodes: a:1 is named twice"),
    ("servers of no cache", "[services]", '[cache]\nnodes = ["a:1"]\n[services]',
     "cache: nodes: the backend 'none' has no servers"),
    ("services that are no cache", 'redis = "redis://127.0.0.1:6379/0"',
     'memcached = "here"\n[cache]\nbackend = "memcached"', "services.memcached: nodes: 'here'"),
    ("misspelt cache key", "[services]", "[cache]\ntimeuot = 0.01\n[services]",
     "cache.timeuot: unknown key; did you mean 'timeout'"),
    ("two endpoints on one port", "5502", "5501", "already physical.alpha.primary"),
    ("two physical shards on one port", "5503", "5501", "already physical.alpha.primary"),
    ("overlap", '"3-6"', '"2-6"', "2 is already placed on 'alpha'"),
    ("gap", '"3-6"', '"4-6"', "3 placed nowhere"),
    ("beyond", '"0-2, 7"', '"0-2, 7-8"', "8 is beyond the last logical shard 7"),
    ("descending", '"3-6"', '"6-3"', "must ascend"),
    ("not a range", '"3-6"', '"3-x"', "not a number or a range"),
    ("too many shards", "logical_shards = 8", "logical_shards = 8193", "8192"),
    ("no shards", "logical_shards = 8", "logical_shards = 0", "greater than or equal to 1"),
    ("wrong type", "logical_shards = 8", 'logical_shards = "8"', "valid integer"),
    ("name twice", 'name = "beta"', 'name = "alpha"', "used twice"),
    ("hostile name", 'name = "beta"', 'name = "be\\"ta"', "physical.1.name"),
    ("not an address", "postgresql://app:hunter2@127.0.0.1:5503/demo", "nonsense",
     "physical.beta.primary: not an address"),
    ("other database", "postgresql://app:hunter2@127.0.0.1:5503", "mysql://app@h:1",
     "must be postgresql://"),
    ("no user", "postgresql://app:hunter2@127.0.0.1:5503", "postgresql://127.0.0.1:5503",
     "user, host and database"),
    ("infinite timeout", "[services]", "[pool]\ntimeout = inf\n[services]", "pool.timeout"),
    ("nan timeout", "[services]", "[pool]\ntimeout = nan\n[services]", "pool.timeout"),
    ("zero timeout", "[services]", "[pool]\ntimeout = 0\n[services]", "pool.timeout"),
    ("yes for a boolean", "[services]", '[pool]\nprepare_statements = "yes"\n[services]',
     "pool.prepare_statements"),
    ("duplicate key", 'name = "demo"', 'name = "demo"\nname = "demo"', "not valid TOML"),
    ("a pin to nobody", "[services]", '[rebalance.pins]\nomega = "3"\n[services]',
     "rebalance.pins.omega: no physical shard is called that; there are alpha, beta"),
    ("a pin of nothing", "[services]", '[rebalance.pins]\nalpha = "8"\n[services]',
     "rebalance.pins.alpha: 8 is beyond the last logical shard 7"),
    ("two pins", "[services]", '[rebalance.pins]\nalpha = "0-2"\nbeta = "2"\n[services]',
     "logical shard 2 is pinned to 'alpha' and to 'beta'"),
    ("a server that holds nothing", 'name = "beta"', 'name = "beta"\nweight = 0',
     "physical.1.weight: "),
    ("missing password file", 'password = "hunter2"', 'password_file = "nowhere"',
     "admin.password_file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_one_line_with_file_key_and_remedy(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert GOOD.count(old) >= 1
    file = write(tmp_path, GOOD.replace(old, new, 1) if old != "5501" else GOOD)
    with pytest.raises(ConfigurationError) as caught:
        load(file)
    text = str(caught.value)
    assert text.startswith(f"{file}: ")
    assert message in text
    assert "\n" not in text
    assert "hunter2" not in text


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such file"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigurationError, match="is a directory"):
        load(tmp_path)
    file = write(tmp_path, GOOD)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load(file)


def test_a_command_finds_the_embedded_clusters_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_file() == Path("shardkit.toml")
    (tmp_path / ".shardkit").mkdir()
    write(tmp_path / ".shardkit", GOOD)
    assert default_file() == Path(".shardkit/shardkit.toml")
    write(tmp_path, GOOD)
    assert default_file() == Path("shardkit.toml")


def test_secrets_that_others_can_read_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    file.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        load(file)
    file.write_text(GOOD.replace(":hunter2", "").replace('password = "hunter2"', ""))
    load(file)


def test_the_admin_password_may_come_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("from file\n")
    (tmp_path / "secret").chmod(0o600)
    file = write(tmp_path, GOOD.replace('password = "hunter2"', 'password_file = "secret"'))
    assert load(file)[1].physical["alpha"].admin_url.password == "from file"
    monkeypatch.setenv("SHARDKIT_ADMIN_PASSWORD", "from environment")
    assert load(file)[1].physical["alpha"].admin_url.password == "from environment"


def test_ranges_are_written_as_they_are_read() -> None:
    assert format_ranges(parse_ranges("0-2, 7,9-9")) == "0-2, 7, 9"
