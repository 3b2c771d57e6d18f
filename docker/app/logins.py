"""Make the logins of the stack once, and give each service the files it needs and no others.

Run by the job `logins` before anything else. Passwords are kept in `/logins/master`; every other
folder is a volume that one kind of service sees under `/run/secrets`. What is there stays: a
second run changes nothing but what the templates say. Servers get verifiers, no passwords; no
password is ever in an argument or in the environment of a container.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from string import Template

from psycopg import pq

LOGINS = Path("/logins")
HERE = Path(__file__).parent

ROLES = ("admin", "app", "replication", "pooler", "monitor")
"""Logins of PostgreSQL, without the `shardkit_` that their names begin with."""

READABLE = 0o440
"""By the owner, and by containers that are in its group."""


def main() -> None:
    """Write every file; each is whole or not there."""
    master = LOGINS / "master"
    words = {name: kept(master / name) for name in (*ROLES, "redis", "token_key")}
    libpq = pq.PGconn.connect_start(b"host=/nowhere")  # it makes verifiers; it connects to nobody
    verifiers = {
        f"{role}_verifier": libpq.encrypt_password(
            words[role].encode(), f"shardkit_{role}".encode(), b"scram-sha-256"
        ).decode()
        for role in ROLES
    }
    if not (LOGINS / "primary/roles.sql").exists():  # a verifier differs each time it is made
        roles = Template((HERE / "roles.sql").read_text(encoding="utf-8"))
        write(LOGINS / "primary/roles.sql", roles.substitute(verifiers))
    write(LOGINS / "replica/pgpass", f"*:*:*:shardkit_replication:{words['replication']}\n")
    write(LOGINS / "redis/redis.conf", f"requirepass {words['redis']}\n")
    write(LOGINS / "redis/password", words["redis"])
    write(LOGINS / "monitor/password", words["monitor"])
    config = Template((HERE / "shardkit.toml").read_text(encoding="utf-8"))
    shared = {**words, "admin_login": ""}
    write(LOGINS / "app/shardkit.toml", config.substitute(shared))
    # Who migrates and renders goes with the admin's login as well.
    shared["admin_login"] = 'password_file = "admin_password"'
    write(LOGINS / "admin/shardkit.toml", config.substitute(shared))
    write(LOGINS / "admin/admin_password", words["admin"])
    write(LOGINS / "admin/pooler_password", words["pooler"])


def kept(file: Path) -> str:
    """Return the secret of a file, made up on the first call."""
    if not file.exists():
        write(file, secrets.token_urlsafe(32))
    return file.read_text(encoding="utf-8")


def write(file: Path, text: str) -> None:
    """Write a file whole or not at all, unless it says the same already."""
    if file.exists() and file.read_text(encoding="utf-8") == text:
        return
    draft = file.with_suffix(".new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, READABLE)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)


if __name__ == "__main__":
    main()
