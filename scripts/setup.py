"""Make the virtual environment and, for the tests, the system packages: all of `make setup`.

Called by the Makefile with the python3 of the machine, so it uses the standard library only.
It may be killed at any point and run again: the stamp is written last, and anything without a
matching stamp is built anew. Two runs at once wait for each other.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "shardkit.stamp"
LOG = VENV / "setup.log"
LOCK = ROOT / "requirements.lock"
PIP = (str(VENV / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--no-input")

# What the tests use beyond what pip brings: program to look for, Debian package that has it.
PROGRAMS = {
    "redis-server": "redis-server",
    "memcached": "memcached",
    "pgbouncer": "pgbouncer",
    "chromium": "chromium",
    "openssl": "openssl",
}

# Servers with TLS, which those from pip lack; Debian has them beside the path.
WITH_TLS = Path("/usr/lib/postgresql"), "*/bin/postgres"

# Forbids a package's own daemon to start, for as long as the process that wrote it lives.
POLICY = Path("/usr/sbin/policy-rc.d")
POLICY_TEXT = "#!/bin/sh\n# shardkit set-up\nkill -0 {pid} 2>/dev/null && exit 101\nexit 0\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Bring the virtual environment up to date, and the system packages when asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--system", action="store_true", help="also the tests' system packages")
    options = parser.parse_args(arguments)
    if sys.version_info < (3, 11):  # noqa: UP036  the machine's python3, not the project's
        fail(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}", "PYTHON=…")
    with one_at_a_time():
        if options.system:
            system_packages()
        virtual_environment()


def virtual_environment() -> None:
    """Create `.venv` from the lock unless the stamp says it is there."""
    key = wanted()
    with contextlib.suppress(OSError):
        if STAMP.read_text(encoding="utf-8") == key:
            return
    if VENV.exists() and not os.access(VENV, os.W_OK):
        fail(f"{VENV} is out of date and belongs to another user", f"sudo rm -r {VENV}")
    if not os.access(ROOT, os.W_OK):
        fail(f"{ROOT} is not writable", "use a checkout of your own")
    if importlib.util.find_spec("ensurepip") is None:
        apt_install(["python3-venv"], why="python3 has no ensurepip, which makes virtual envs")
    say("Creating .venv")
    shutil.rmtree(VENV, ignore_errors=True)
    if subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=False).returncode:
        fail("python3 -m venv failed", "apt-get install python3-venv")
    total = sum("==" in line for line in LOCK.read_text(encoding="utf-8").splitlines())
    with LOG.open("w", encoding="utf-8") as log:
        pip_install(["--require-hashes", "-r", str(LOCK)], log, total)
        pip_install(["--no-deps", "--no-build-isolation", "-e", str(ROOT)], log, 1)
    temporary = STAMP.with_suffix(".new")
    temporary.write_text(key, encoding="utf-8")
    temporary.replace(STAMP)
    say("Ready: .venv")


def wanted() -> str:
    """Return a digest of everything the environment depends on."""
    import tomllib  # noqa: PLC0415  an older python3 gets as far as being refused

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    # The tools' settings take effect without a new environment.
    metadata = json.dumps({name: table for name, table in project.items() if name != "tool"})
    parts = [LOCK.read_bytes(), metadata.encode()]
    parts += [sys.version.encode(), str(ROOT).encode(), sys.executable.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def pip_install(arguments: Sequence[str], log: IO[str], total: int) -> None:
    """Run pip, showing how many of `total` packages it has reached."""
    command = [*PIP, "install", "--progress-bar", "off", *arguments]
    done, lines = 0, []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    ) as pip:
        for line in pip.stdout or ():
            lines.append(line)
            log.write(line)
            if line.startswith(("Collecting", "Ignoring", "Obtaining")):
                done += 1
                bar(done, total, line.split()[1].split("==")[0].split("/")[-1])
            elif line.startswith("Installing"):
                bar(total, total, "installing")
    bar_end()
    if pip.returncode:
        sys.stderr.writelines(lines[-12:])
        fail("pip could not install what requirements.lock lists", f"the whole log: {LOG}")


def system_packages() -> None:
    """Install the programs the tests use, or say what will be skipped."""
    missing = [package for program, package in PROGRAMS.items() if not has(program)]
    folder, pattern = WITH_TLS
    if not (has("postgres") or any(folder.glob(pattern))):
        missing.append("postgresql")
    if missing:
        apt_install(missing, why=f"not found: {', '.join(missing)}", required=in_ci())


def has(program: str) -> bool:
    """Return whether a program is installed; Debian keeps some servers off a user's PATH."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
    return shutil.which(program, path=path) is not None


def in_ci() -> bool:
    """Return whether this is continuous integration, where nothing may be missing."""
    return os.environ.get("CI", "").lower() in {"1", "true"}


def apt_install(packages: Sequence[str], *, why: str, required: bool = True) -> None:
    """Install Debian packages when root on Debian; otherwise say how, and stop if required."""
    remedy = f"apt-get install {' '.join(packages)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        if required:
            fail(why, remedy)
        say(f"{why}; the tests that need it are skipped ({remedy})")
        return
    say(f"{why}; installing with apt")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    quiet = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    with daemons_stay_off(), tempfile.TemporaryFile("w+") as log:
        for step in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            run = subprocess.run(
                [*quiet, *step], check=False, env=environment, stdout=log, stderr=log
            )
            if run.returncode and step[0] == "install":
                log.seek(0)
                sys.stderr.writelines(log.readlines()[-8:])
                if required:
                    fail(f"apt could not install {' '.join(packages)}", remedy)
                say(f"apt could not install {' '.join(packages)}; tests that need it are skipped")


@contextlib.contextmanager
def daemons_stay_off() -> Iterator[None]:
    """Keep apt from starting the servers it installs; a policy of the machine's own is kept."""
    ours = not POLICY.exists() or "shardkit set-up" in POLICY.read_text(encoding="utf-8")
    if ours:
        POLICY.write_text(POLICY_TEXT.format(pid=os.getpid()), encoding="utf-8")
        POLICY.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            POLICY.unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold a lock that dies with the process."""
    with LOCK.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up is running; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def bar(done: int, total: int, what: str) -> None:
    """Draw a progress bar on a terminal; draw nothing elsewhere."""
    if sys.stdout.isatty():
        filled = 30 * min(done, total) // total
        print(f"\r  [{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {what:<32.32}", end="")
        sys.stdout.flush()


def bar_end() -> None:
    """Leave the line of the progress bar."""
    if sys.stdout.isatty():
        print("\r" + " " * 80 + "\r", end="", flush=True)


def say(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)


def fail(problem: str, remedy: str) -> NoReturn:
    """Stop with one line that names the remedy."""
    sys.exit(f"set-up: {problem}; {remedy}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("set-up: interrupted; run it again")
