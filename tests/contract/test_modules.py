"""Every module says what it is for, and exports what it says."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import shardkit

MODULES = [
    "shardkit",
    *(
        found.name
        for found in pkgutil.walk_packages(shardkit.__path__, "shardkit.")
        if not found.name.endswith("__main__")
    ),
]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_a_text_and_exports_what_it_says(name: str) -> None:
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), "a module begins with its one job"
    exported = getattr(module, "__all__", ())
    assert len(set(exported)) == len(exported)
    missing = [item for item in exported if not hasattr(module, item)]
    assert not missing, "named in __all__ but not there"


def test_imports_go_down_the_ladder_only() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run(
        [str(program), "--no-cache"],
        cwd=Path(shardkit.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_sessions_override_nothing_of_sqlalchemys_by_accident() -> None:
    """SQLAlchemy's `Session` has private names too; a clash would break it silently."""
    from sqlalchemy.orm import Session

    from shardkit import ReadSession, WriteSession, binds, cachedsession, emitter, session, writer
    from shardkit.binds import BoundSession
    from shardkit.cachedsession import CachedSession
    from shardkit.emitter import EmittingSession

    theirs = {*dir(Session), *vars(Session())}
    meant = {
        "_bulk_save_mappings", "_connection_for_bind", "_execute_internal", "_identity_lookup", "close",
        "commit", "connection",
        "connection_callable", "flush", "get", "get_bind", "rollback",
    }  # fmt: skip
    classes = (BoundSession, CachedSession, ReadSession, EmittingSession, WriteSession)
    defined = {name for each in classes for name in vars(each)}
    source = "".join(map(inspect.getsource, (binds, cachedsession, session, emitter, writer)))
    assigned = re.findall(r"self\.(\w+)(?:: [^=\n]+)? = ", source)
    assert assigned
    ours = {name for name in (*defined, *assigned) if not name.startswith("__")}
    assert ours & theirs == meant


def test_sessions_have_their_listeners_before_the_first_one_is_made() -> None:
    """SQLAlchemy collects them at the first one, and a thread beside it would find none."""
    program = (
        "from shardkit import ReadSession, WriteSession\n"
        "from sqlalchemy.orm import Session\n"
        "collected = Session.dispatch.do_orm_execute._clslevel\n"
        "print(*(len(collected.get(each, ())) for each in (ReadSession, WriteSession)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["1", "1"]


def test_the_ladder_in_the_documentation_is_the_one_that_is_enforced() -> None:
    root = Path(shardkit.__file__).parent.parent
    project = tomllib.loads(root.joinpath("pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    enforced = [set(re.findall(r"\w+", layer)) - {"__main__"} for layer in layers]
    text = root.joinpath("docs/architecture.md").read_text(encoding="utf-8")
    block = text.split("## The ladder")[1].split("\n\n")[2]
    drawn = [set(re.findall(r"\w+", line)) for line in block.splitlines()]
    assert drawn == [rung for rung in enforced if rung]
