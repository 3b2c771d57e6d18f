"""`[admin]`, `[roles]` and `[tls]`: who logs in how, and the one line that says what is wrong."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
from sqlalchemy import make_url

from shardkit.config import load
from shardkit.errors import ConfigurationError
from shardkit.secret import Secret, without_frames
from shardkit.topology import RoleNames, libpq_options, like

GOOD = """
[cluster]
name = "demo"
logical_shards = 2

[admin]
user = "adm"
password_file = "secrets/admin"

[roles]
app = { password_file = "secrets/app" }
migrator = { password_file = "secrets/migrator" }
relay = { user = "Relay 1", password_file = "secrets/relay" }
monitor = { password = "in the file" }

[tls]
mode = "verify-full"
root_cert = "root.crt"
channel_binding = "require"
require_auth = "scram-sha-256"

[[physical]]
name = "alpha"
logical_shards = "0"
primary = "postgresql://app@127.0.0.1:5501/demo"
replicas = ["postgresql://app@127.0.0.1:5502/demo?sslmode=require"]

[[physical]]
name = "beta"
logical_shards = "1"
pooler = "pgbouncer 1.24"
primary = "postgresql://app@127.0.0.1:6432/demo"
admin = "postgresql://app@127.0.0.1:5503/demo"
"""
DUTIES = ("admin", "app", "migrator", "relay")


def write(folder: Path, text: str = GOOD) -> Path:
    (folder / "secrets").mkdir(exist_ok=True)
    for name in DUTIES:
        secret(folder / "secrets" / name, f"p@ss {name}\n")
    (folder / "root.crt").write_text("a certificate")
    return secret(folder / "shardkit.toml", text)


def secret(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    file.chmod(0o600)
    return file


def test_everybody_has_an_address(tmp_path: Path) -> None:
    _, topology = load(write(tmp_path))
    alpha, beta = topology.physical.values()
    assert alpha.roles == RoleNames(
        owner="shardkit_owner", app="app", admin="adm", migrator="shardkit_migrator",
        mover="shardkit_migrator", relay="Relay 1", monitor="shardkit_monitor",
    )  # fmt: skip
    found = {
        url.username: (url.port, url.password)
        for shard in (alpha, beta)
        for url in (
            shard.primary.url, shard.admin_url, shard.control_url, shard.relay_url, shard.monitor_url,
        )
        if url is not None
    }  # fmt: skip
    assert found == {
        "app": (6432, "p@ss app"), "Relay 1": (6432, "p@ss relay"), "adm": (5503, "p@ss admin"),
        "shardkit_migrator": (5503, "p@ss migrator"), "shardkit_monitor": (5503, "in the file"),
    }  # fmt: skip
    assert alpha.mover_url is None
    assert libpq_options(alpha.primary.url)["password"] == "p@ss app"
    assert "p@ss" not in f"{topology!r} {alpha!r} {libpq_options(alpha.admin_url)!r}"


def test_without_roles_there_are_two(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("[roles]")] + GOOD[GOOD.index("[tls]") :]
    _, topology = load(write(tmp_path, text))
    alpha = topology.physical["alpha"]
    assert alpha.roles == RoleNames.of(app="app", admin="adm")
    assert alpha.admin_url == alpha.control_url == alpha.looking_url
    assert alpha.relay_url is None
    assert not alpha.roles.has_relay
    assert not alpha.roles.has_monitor


def test_tls_is_for_every_address_that_does_not_say_otherwise(tmp_path: Path) -> None:
    _, topology = load(write(tmp_path))
    alpha, beta = topology.physical.values()
    root = str(tmp_path / "root.crt")
    for url in (alpha.primary.url, alpha.admin_url, beta.admin_url):
        assert dict(url.query) == {
            "sslmode": "verify-full", "sslrootcert": root, "channel_binding": "require",
            "require_auth": "scram-sha-256",
        }  # fmt: skip
    assert alpha.replicas[0].url.query["sslmode"] == "require"
    assert beta.primary.url.query["channel_binding"] == "prefer", "PgBouncer cannot"


def test_a_client_certificate_goes_with_its_login(tmp_path: Path) -> None:
    for name in ("c.crt", "c.key", "m.crt", "m.key"):
        secret(tmp_path / name, name)
    text = GOOD.replace(
        'mode = "verify-full"', 'mode = "verify-full"\ncert = "c.crt"\nkey = "c.key"'
    )
    text = text.replace(
        'monitor = { password = "in the file" }', 'monitor = { cert = "m.crt", key = "m.key" }'
    )
    alpha = load(write(tmp_path, text))[1].physical["alpha"]
    assert alpha.primary.url.query["sslkey"] == str(tmp_path / "c.key")
    assert alpha.looking_url.query["sslkey"] == str(tmp_path / "m.key")
    assert alpha.looking_url.password is None
    moved = like(alpha.looking_url, alpha.replicas[0].url)
    assert (moved.port, moved.password) == (5502, None)
    assert moved.query["sslkey"] == str(tmp_path / "m.key")
    back = like(alpha.primary.url, alpha.looking_url)
    assert back.query["sslkey"] == str(tmp_path / "c.key")


@pytest.mark.parametrize("duty", DUTIES)
def test_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, duty: str) -> None:
    monkeypatch.setenv(f"SHARDKIT_{duty.upper()}_PASSWORD", "from outside")
    alpha = load(write(tmp_path))[1].physical["alpha"]
    urls = {
        "admin": alpha.control_url, "app": alpha.primary.url, "migrator": alpha.admin_url,
        "relay": alpha.relay_url,
    }  # fmt: skip
    for name, url in urls.items():
        assert url is not None
        assert (url.password == "from outside") is (name == duty)


BAD = [
    ("two of one name", 'user = "Relay 1"', 'user = "shardkit_migrator"',
     "roles: relay: 'shardkit_migrator' is the migrator already"),
    ("the application's name", 'user = "Relay 1"', 'user = "app"',
     "roles.relay: 'app' is the application of physical.alpha already"),
    ("an owner alone", "migrator = { password_file", 'owner = "x"\n# = { password_file',
     "roles: owner: needs a migrator"),
    ("a name of PostgreSQL's", 'user = "Relay 1"', 'user = "pg_relay"',
     "roles.relay.user: PostgreSQL keeps the name"),
    ("a name that would be cut", 'user = "Relay 1"', f'user = "{"é" * 32}"', "has 1 to 63 bytes, and this has 64"),
    ("no name", 'user = "Relay 1"', 'user = ""', "has 1 to 63 bytes, and this has 0"),
    ("a name that moves the cursor", 'user = "Relay 1"', r'user = "a\u001b[2J"', "has no control characters"),
    ("another user in the address", "app = {", 'app = { user = "somebody",',
     "physical.alpha.primary: says user 'app', and roles.app.user 'somebody'"),
    ("an unknown duty", "monitor = {", "watcher = {", "roles.watcher: unknown key"),
    ("a misspelt key", "monitor = { password", "monitor = { pasword", "did you mean 'password'"),
    ("half a certificate", "monitor = {", 'monitor = { cert = "root.crt",', "give both, or neither"),
    ("nobody to trust", 'root_cert = "root.crt"', "", "tls: root_cert: verify-full needs to know whom"),
    ("trust without checks", 'mode = "verify-full"', 'mode = "require"', "tls: mode: require checks no certificate"),
    ("a mode that is none", 'mode = "verify-full"', 'mode = "verify"', "tls.mode: Input should be"),
    ("binding without TLS", 'mode = "verify-full"\nroot_cert = "root.crt"', 'mode = "prefer"',
     "tls: channel_binding: needs TLS"),
    ("an injected option", '"scram-sha-256"', '"scram-sha-256 host=evil"', "tls.require_auth"),
    ("no such certificate", '"root.crt"', '"rot.crt"', "tls.root_cert: {0}/rot.crt: no such file"),
    ("a folder", '"root.crt"', '"secrets"', "tls.root_cert: {0}/secrets is no file"),
    ("no such secret", "secrets/relay", "secrets/rely", "roles.relay.password_file: {0}/secrets/rely: no such file"),
    ("a path through a file", "secrets/relay", "root.crt/relay", "cannot be read: Not a directory"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"), [case[1:] for case in BAD], ids=[c[0] for c in BAD]
)
def test_one_line_says_what_is_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    file = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigurationError) as caught:
        load(file)
    assert message.replace("{0}", str(tmp_path)) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith(str(file))


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("secrets/relay", 0o604, "roles.relay.password_file: {} may be read by others"),
        ("secrets/admin", 0o644, "admin.password_file: {} may be read by others"),
        ("c.key", 0o644, "tls.key: {} may be read by the group or others; run `chmod 600"),
        ("shardkit.toml", 0o644, "holds passwords and others may read it; run `chmod 600"),
    ],
)
def test_what_others_may_read_is_refused(
    tmp_path: Path, name: str, mode: int, message: str
) -> None:
    text = GOOD.replace(
        'mode = "verify-full"', 'mode = "verify-full"\ncert = "c.key"\nkey = "c.key"'
    )
    file = write(tmp_path, text)
    secret(tmp_path / "c.key", "a key")
    load(file)
    (tmp_path / name).chmod(mode)
    with pytest.raises(ConfigurationError) as caught:
        load(file)
    assert message.format(tmp_path / name) in caught.value.message


@pytest.mark.parametrize("text", ["", "\n", "one\ntwo\n", "nul\0"])
def test_a_password_is_one_line(tmp_path: Path, text: str) -> None:
    file = write(tmp_path)
    secret(tmp_path / "secrets/relay", text)
    with pytest.raises(
        ConfigurationError, match=r"roles\.relay\.password_file: is empty, or has more"
    ):
        load(file)


def test_a_secret_is_shown_to_nobody_but_the_driver() -> None:
    found = Secret("abc")
    assert repr(found) == "'***'"
    assert (found, f"{found}", found.encode()) == ("abc", "abc", b"abc")
    url = make_url("postgresql://u@h/d")._replace(password=found)
    assert libpq_options(url)["password"] == "abc"
    assert "abc" not in repr(libpq_options(url))


def test_an_error_without_frames_has_none_anywhere() -> None:
    def leak(told: str) -> None:
        assert told
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    with pytest.raises(ValueError, match="outer") as caught:
        leak("abc" + "def")
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert "abcdef" in "".join(shown.format())
    shown = traceback.TracebackException.from_exception(
        without_frames(caught.value), capture_locals=True
    )
    assert "abcdef" not in "".join(shown.format())
    assert "inner" in "".join(shown.format())
