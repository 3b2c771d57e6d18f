"""What the containers may do, who they are, and where secrets are not."""

from __future__ import annotations

import json

from tests.fixtures.stack import Stack

JOBS = {"logins", "migrate", "poolers"}


def test_no_process_is_root(stack: Stack) -> None:
    n_processes = 0
    for container in stack.containers():
        if stack.state(container) == "exited":
            continue
        _, *lines = stack.engine("top", container, "-eo", "uid,pid,args").splitlines()
        n_processes += len(lines)
        roots = [line for line in lines if line.split()[0] == "0"]
        assert not roots, f"{container}: {roots}"
    assert n_processes > 50


def test_every_container_is_confined(stack: Stack) -> None:
    found = stack.inspect(*stack.containers())
    services = {each["Config"]["Labels"]["com.docker.compose.service"] for each in found}
    assert services >= {"nginx", "app", "relay", "redis", "alpha-0", "beta-3", "prometheus", *JOBS}
    for each in found:
        name, host, config = each["Name"], each["HostConfig"], each["Config"]
        assert config["User"] not in {"", "root", "0", "0:0"}, name
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert not host["CapAdd"], name
        assert not host["Privileged"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert host["Memory"] > 0, name
        assert host["PidsLimit"] > 0, name
        assert host["LogConfig"]["Config"].keys() >= {"max-size", "max-file"}, name
        for published in (host["PortBindings"] or {}).values():
            assert all(port["HostIp"] == "127.0.0.1" for port in published), name
        if config["Labels"]["com.docker.compose.service"] not in JOBS:
            assert config["Healthcheck"]["Test"], name
            assert host["RestartPolicy"]["Name"] == "unless-stopped", name


def test_secrets_are_in_files_only(stack: Stack) -> None:
    printed = stack.command(
        *("run", "--rm", "--no-deps", "--entrypoint", "python", "logins", "-c"),
        "import json, pathlib; print(json.dumps({each.name: each.read_text() "
        "for each in pathlib.Path('/logins/master').iterdir()}))",
    )
    secrets: dict[str, str] = json.loads(printed)
    assert secrets.keys() >= {"admin", "app", "replication", "pooler", "redis", "token_key"}
    assert all(len(secret) >= 32 for secret in secrets.values())

    containers = stack.containers()
    places = {
        "what the engine tells of containers": json.dumps(stack.inspect(*containers)),
        "the logs": stack.command("logs", "--no-color"),
    }
    for each in containers:
        if stack.state(each) != "exited":
            places[f"the arguments of {each}"] = stack.engine("top", each, "-eo", "pid,args")
    for where, text in places.items():
        assert text
        hits = [name for name, secret in secrets.items() if secret in text]
        assert not hits, f"{where}: {hits}"


def test_each_service_sees_its_own_logins(stack: Stack) -> None:
    seen = {
        service: stack.command("exec", "-T", service, "ls", "/run/secrets").split()
        for service in ("app", "relay", "alpha-0", "alpha-1", "redis", "postgres-exporter")
    }
    assert seen["app"] == seen["relay"] == ["shardkit.toml"]
    assert seen["alpha-0"] == ["roles.sql"]
    assert seen["alpha-1"] == ["pgpass"]
    assert seen["postgres-exporter"] == ["password"]
    assert stack.run("exec", "-T", "nginx", "ls", "/run/secrets").returncode != 0
    # The service has no login that owns anything, and servers have verifiers only.
    assert "password_file" not in stack.command(
        "exec", "-T", "app", "cat", "/run/secrets/shardkit.toml"
    )
    roles = stack.command("exec", "-T", "alpha-0", "cat", "/run/secrets/roles.sql")
    assert roles.count("PASSWORD 'SCRAM-SHA-256$") == roles.count("PASSWORD '") == 5


def test_databases_are_out_of_reach_of_the_web(stack: Stack) -> None:
    def reaches(service: str, host: str, port: int) -> bool:
        connect = f"exec 3<>/dev/tcp/{host}/{port}"
        done = stack.run("exec", "-T", service, "timeout", "5", "bash", "-c", connect)
        return done.returncode == 0

    assert reaches("app", "pgbouncer-alpha", 6432)
    assert reaches("pgbouncer-alpha", "alpha-0", 5432)
    assert reaches("nginx", "app", 8000)
    assert not reaches("app", "alpha-0", 5432)
    assert not reaches("nginx", "pgbouncer-alpha", 6432)
    assert not reaches("nginx", "redis", 6379)
