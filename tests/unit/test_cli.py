"""The root of the command line: everything ends in an exit code, nothing in a trace."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shardkit.cli import main
from shardkit.commands import ids
from shardkit.errors import RefusedError, TryAgainError


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("migrate", "nonsense"), ("ids", "parse"), ("ids", "parse", "--nonsense", "1")],
)
def test_a_usage_error_is_exit_2_with_a_word_on_help(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert "--help" in capsys.readouterr().err


def test_help_is_exit_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "migrate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"), [(RefusedError("no", hint="why"), 3), (TryAgainError("later"), 4)]
)
def test_an_error_is_a_line_and_a_hint(
    error: Exception,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: int) -> None:
        raise error

    monkeypatch.setattr(ids, "parse", fail)
    assert run("ids", "parse", "1") == code
    output = capsys.readouterr().err
    assert output.startswith(f"error: {error.args[0]}\n")


def test_an_interrupt_is_exit_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ids, "parse", interrupt)
    assert run("ids", "parse", "1") == 130


def test_the_module_runs_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shardkit", "ids", "parse", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
