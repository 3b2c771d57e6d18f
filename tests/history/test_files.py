"""Recorders, files and the command: what a killed client leaves behind can be judged."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.history.judge import judge, main
from tests.history.ledger import Ledger
from tests.history.lines import Script
from tests.history.recorder import HistoryFullError, Recorder
from tests.history.records import HistoryError, Operation, Outcome, read_file


def _operations(path: Path) -> list[Operation]:
    return [record for record in read_file(path) if isinstance(record, Operation)]


def test_what_is_recorded_is_read(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "a", now=iter(range(1, 99)).__next__, run="r1")
    n = recorder.invoke("append", [["append", "x", 1], ["read", "x"]], shard=4, deadline=2.0)
    recorder.ok(n, [[1]], endpoint="alpha")
    recorder.fail(recorder.invoke("call", ["x"]), why="no")
    recorder.unknown(recorder.invoke("call", ["x"]), why="lost")
    recorder.invoke("call", ["x"])
    recorder.fact("fault", name="kill")
    recorder.end()
    ops = _operations(recorder.path)
    assert [op.outcome.name for op in ops] == ["OK", "FAIL", "UNKNOWN", "UNKNOWN"]
    assert ops[0].got == [[1]]
    assert ops[0].more == {"shard": 4, "deadline": 2.0, "endpoint": "alpha"}
    assert (ops[0].invoked, ops[0].answered) == (1, 2)
    assert ops[1].more == {"why": "no"}
    assert ops[3].answered is None
    ledger = Ledger.read(tmp_path)
    assert ledger.ended == {"a"}
    assert "fault" in ledger.facts
    with pytest.raises(OSError, match="closed"):
        recorder.invoke("call", ["x"])
    with pytest.raises(FileExistsError):
        Recorder(tmp_path, "a")


def test_a_file_that_is_cut_anywhere_says_less_and_nothing_wrong(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "whole", "a")
    for i in range(3):
        n = recorder.invoke("append", [["append", "x", i], ["read", "x"]])
        recorder.ok(n, [list(range(i + 1))])
    recorder.end()
    data = recorder.path.read_bytes()
    first = data.index(b"\n") + 1
    cut = tmp_path / "a.jsonl"
    seen = set()
    for end in range(first, len(data) + 1):
        cut.write_bytes(data[:end])
        ops = _operations(cut)
        good = [op for op in ops if op.outcome is Outcome.OK]
        assert len(ops) - len(good) <= 1, "one at a time is under way"
        assert all(op.got[0][-1] == op.n - 1 for op in good)
        seen.add((len(ops), len(good)))
    assert seen == {(0, 0), *((i, i - 1) for i in range(1, 4)), *((i, i) for i in range(1, 4))}


def test_a_client_that_is_killed_leaves_what_it_had_begun(tmp_path: Path) -> None:
    program = (
        "import itertools, pathlib, sys\n"
        "from tests.history.recorder import Recorder\n"
        "recorder = Recorder(pathlib.Path(sys.argv[1]), 'a')\n"
        "for i in itertools.count():\n"
        "    n = recorder.invoke('append', [['append', 'x', i]])\n"
        "    print(n, flush=True)\n"
        "    recorder.ok(n, [])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for _ in range(200):
            told = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        told = max([told, *(int(line) for line in child.stdout if line.endswith("\n"))])
    ops = _operations(tmp_path / "a.jsonl")
    assert len(ops) >= told >= 200
    assert all(op.outcome is Outcome.OK for op in ops[:-1])


def test_a_file_that_is_full_takes_answers_only(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "a", limit_bytes=(1 << 20) + 400)
    begun = [recorder.invoke("call", ["x" * 50]) for _ in range(3)]
    with pytest.raises(HistoryFullError, match="reached"):
        recorder.invoke("call", ["x"])
    for n in begun:
        recorder.ok(n)
    recorder.end()
    assert all(op.outcome is Outcome.OK for op in _operations(recorder.path))


def test_a_disk_that_is_full_ends_the_file_with_the_torn_line(tmp_path: Path) -> None:
    program = (
        "import pathlib, resource, signal, sys\n"
        "from tests.history.recorder import Recorder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "recorder = Recorder(pathlib.Path(sys.argv[1]), 'a')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "refused = 0\n"
        "for i in range(50):\n"
        "    try:\n"
        "        recorder.ok(recorder.invoke('call', ['x']))\n"
        "    except OSError:\n"
        "        refused += 1\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "print(refused)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) > 30
    ops = _operations(tmp_path / "a.jsonl")
    assert len(ops) > 3
    assert sum(op.outcome is Outcome.UNKNOWN for op in ops) <= 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"type": "ok", "n": 9, "at": 1}', "answers nothing"),
        ('{"type": "invoke", "n": 1, "at": 1}', "lacks"),
        ("not json", "not JSON"),
        ('{"type": "what"}', "no line is of type"),
        ('{"type": "invoke", "n": 1, "at": 1, "kind": "wrong", "do": []}', "no kind"),
    ],
)
def test_what_is_no_history_is_refused_with_file_and_line(
    tmp_path: Path, line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = '{"history": 1, "process": "a", "clock": "c"}'
    (tmp_path / "a.jsonl").write_text(f"{first}\n{line}\n" + '{"type": "end", "at": 2}\n')
    with pytest.raises(HistoryError, match=says):
        Ledger.read(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


def _record(folder: Path, *, is_broken: bool = False, has_reads: bool = True) -> None:
    recorders = [Recorder(folder, f"client-{i}") for i in range(3)]
    values: list[int] = []
    for i in range(30):
        recorder = recorders[i % 3]
        do: list[list[object]] = [["append", "x", i]]
        if has_reads:
            do.append(["read", "x"])
        n = recorder.invoke("append", do, level="repeatable read", deadline=5.0)
        values.append(i)
        recorder.ok(n, [list(values)] if has_reads else [])
        if is_broken and i == 20:
            values.pop()
            now = time.monotonic_ns()
            recorder.fact("fault", name="kill alpha", began=now - 10**10, healed=now)
    for recorder in recorders:
        recorder.end()


def test_the_command_says_that_all_is_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _record(tmp_path)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "30 reads, 30 transactions, 30 appends" in out
    assert out.endswith("no violation\n")


def test_the_command_tells_the_story(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _record(tmp_path, is_broken=True)
    assert main([str(tmp_path), "--within", "0"]) == 1
    out = capsys.readouterr().out
    assert "incompatible order: x was read with two histories" in out
    assert "lost write: 20 of x is gone: client-2 #7 was told that it is there" in out
    assert "meanwhile: kill alpha [" in out
    assert 'client-2 #7 append [["append", "x", 20], ["read", "x"]] OK' in out
    assert main([str(tmp_path), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == 1
    assert document["judges"]["appends"]["totals"]["lost write"] == 1


def test_a_judge_that_checked_nothing_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _record(tmp_path / "blind", has_reads=False)
    assert main([str(tmp_path / "blind")]) == 3
    assert "appends has checked nothing" in capsys.readouterr().out
    _record(tmp_path / "good")
    assert main([str(tmp_path / "good"), "--require", "appends,outbox"]) == 3
    assert "outbox has checked nothing" in capsys.readouterr().out
    Recorder(tmp_path / "idle", "a").end()
    assert main([str(tmp_path / "idle")]) == 3
    assert main([str(tmp_path / "nothing")]) == 2


def test_twice_the_history_takes_about_twice_the_time() -> None:
    def seconds(n: int) -> float:
        rng, script, lists = random.Random(n), Script(), dict[str, list[int]]()
        for i in range(n):
            key = f"k{i // 200}.{rng.randrange(5)}"
            values = lists.setdefault(key, [])
            values.append(i)
            script.txn(f"p{i % 16}", (key, i), (key, list(values)))
        began = time.process_time()
        assert judge(script.ledger())["appends"].violations == 0
        return time.process_time() - began

    seconds(500)
    assert min(seconds(8_000) for _ in range(2)) < 8 * min(seconds(2_000) for _ in range(2))
