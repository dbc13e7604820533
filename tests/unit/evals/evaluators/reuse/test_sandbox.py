"""Programs that must run, and those that must not get out: as this user, and as an ordinary one where this is root."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.config import Limits
from anchorctx.evals.evaluators.reuse.tasks.sandbox import CodeProblem, check_sandbox, passes, verdict
from anchorctx.evals.evaluators.reuse.tasks.sandbox.child import confine, values

from . import escapes

ROOT = Path(__file__).parents[5]
NOBODY = 65534
ORDINARY = """
def f(kind):
    import collections, datetime, decimal, enum, fractions, functools, hashlib, heapq, itertools, math, random, re
    import statistics, string, copy, bisect, operator, typing, dataclasses, unicodedata, textwrap, calendar
    if kind == "hash": return hashlib.md5(b"a").hexdigest()
    if kind == "date": return datetime.datetime.strptime("2024-02-29", "%Y-%m-%d").weekday()
    if kind == "now": return datetime.datetime.now().year > 2000 and random.random() < 1
    if kind == "decimal": return float(decimal.Decimal("0.1") + 1)
    if kind == "numpy":
        import numpy as np
        return [np.int64(3), np.float32(0.5), np.bool_(True), np.ones((2, 2)).dot(np.ones(2)).tolist()]
    if kind == "large": return 3 ** 20_000
    if kind == "named": return collections.namedtuple("P", "x y")(1, 2), collections.Counter("aab")
    if kind == "kinds": return None, True, 1.5, 2j, b"a", "\\ud800", {1, (2, 3)}, frozenset("a"), {(1, 2): [math.inf]}
    if kind == "error": [][1]
    if kind == "deep": return functools.reduce(lambda a, _: [a], range(100), 0)
    if kind == "file": return __file__
    if kind == "parse": return eval("1 + 1") + int(re.sub("a", "", "1a2"))
"""
EXPECTED = """
def check(f):
    assert f("hash") == "0cc175b9c0f1b6a831c399e269772661"
    assert f("date") == 3 and f("now") is True and f("decimal") == 1.1
    assert f("numpy") == [3, 0.5, True, [2.0, 2.0]]
    assert f(kind="large") == 3 ** 20_000
    assert f("named") == ((1, 2), {"a": 2, "b": 1})
    kinds = None, True, 1.5, 2j, b"a", "\\ud800", {1, (2, 3)}, frozenset("a"), {(1, 2): [1e999]}
    assert f("kinds") == kinds and list(map(type, f("kinds"))) == list(map(type, kinds))
    nested, deep = f("deep"), 0
    while nested: nested, deep = nested[0], deep + 1
    assert deep == 100 and f("parse") == 14
    for kind, error in (("error", IndexError), ("file", NameError), (list(range(9)), None)):
        try:
            assert f(kind) is None
        except Exception as found:
            assert type(found) is error
    assert helper(2) == 4
"""
"""Uses `helper`, which the prompt defines."""


def test_what_programs_need_works() -> None:
    problem = CodeProblem("import math\ndef helper(x):\n    return 2 * x\n\ndef f(kind):\n    'doc'\n", EXPECTED, "f")
    assert passes(ORDINARY, problem, Limits())


@pytest.mark.parametrize(
    ("program", "good"),
    [
        ("def f(x): return x + 1", True),
        ("def f(x): return x", False),
        ("print('a' * 10**6)\ndef f(x):\n    print(x)\n    return x + 1", True),
        ("class A:\n    def __call__(self, x): return x + 1\nf = A()", True),
        ("if __name__ == '__main__':\n    def f(x): return x + 1", True),
    ],
)
def test_the_tests_decide(program: str, good: bool) -> None:
    assert passes(program, escapes.TESTS, Limits()) is good


def test_a_program_that_does_not_load_fails_tests_that_never_call_it() -> None:
    lax = CodeProblem("def f(x):\n", "def check(f): pass\n", "f")
    assert passes("", lax, Limits()) and not passes("1 / 0", lax, Limits())


def test_no_program_gets_out() -> None:
    """241 attempts; the calls that are not listed are 1,300 more."""
    assert escapes.count() >= 150
    assert escapes.escaped() == []


@pytest.mark.slow
def test_no_exit_status_counts() -> None:
    assert escapes.successes(escapes.exits(), Limits()) == []


def ordinary(code: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python as an ordinary user; skips the test where there is no Python for one."""
    python = next((p for p in (sys.executable, shutil.which("python3", path="/usr/bin")) if p and _theirs(p)), None)
    if python is None or not os.access(ROOT, os.R_OK):
        pytest.skip("no Python 3.11 that an ordinary user could run")
    site = Path(json.__file__).parents[0] if python == sys.executable else Path(pytest.__file__).parents[1]
    environment = {"PYTHONPATH": f"{ROOT}:{site}", "PYTHONDONTWRITEBYTECODE": "1"}
    given = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    return subprocess.run([python, *code], env=environment, capture_output=True, text=True, cwd="/", **given)


def _theirs(python: str) -> bool:
    command = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    with suppress(OSError):
        given = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        return subprocess.run(command, **given, cwd="/", capture_output=True).returncode == 0
    return False


@pytest.mark.skipif(os.geteuid() != 0, reason="the test above was an ordinary user's already")
def test_no_program_of_an_ordinary_user_gets_out() -> None:
    """All system calls, and each third of the others: the verdict does not depend on who runs it."""
    done = ordinary([escapes.__file__, "3"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the tests above were an ordinary user's already")
def test_no_program_of_an_ordinary_user_gets_out_of_all() -> None:
    done = ordinary([escapes.__file__, "1", "long"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_without_the_sandbox_they_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the attacks are real: harmless ones succeed where nothing is confined."""
    names = "open to write", "chmod", "symlink", "chdir", "pipe", "eventfd", "memfd_create", "unlink", "socketpair"
    attacks = {name: escapes.REFUSED[name] for name in names}
    monkeypatch.setattr(escapes, "passes", lambda *given: passes(*given, unsafe=True))
    victim = tmp_path / "victim"
    victim.write_text("whole")
    assert escapes.refusals(attacks, victim) == list(names)
    assert os.listdir(tmp_path) == ["new"]  # the link; the victim is gone


# -- where it cannot be, and what is left ------------------------------------------------------------------------------


@pytest.fixture
def unknown_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(verdict.CHILD, tmp_path / "child")
    source = (folder / "confine.py").read_text()
    (folder / "confine.py").write_text(
        source.replace('MACHINES = {"x86_64"', 'MACHINES = {"vax"').replace("aarch64", "pdp")
    )
    monkeypatch.setattr(verdict, "CHILD", folder)


@pytest.mark.usefixtures("unknown_machine")
def test_a_machine_that_cannot_confine_is_refused_unless_unsafe() -> None:
    with pytest.raises(UserError, match="cannot be confined here.*unsafe_code_execution=true"):
        check_sandbox(Limits())
    check_sandbox(Limits(), unsafe=True)


def test_limits_that_no_program_keeps_are_refused() -> None:
    with pytest.raises(UserError, match="a right program of two lines fails .*wall_seconds=0.001.*: raise them"):
        check_sandbox(Limits(wall_seconds=0.001))


def test_arguments_that_cannot_be_sent_are_named() -> None:
    problem = CodeProblem("def f(x):\n", "def check(f):\n    f(len)\n", "f")
    with pytest.raises(UserError, match="the tests of f give it more than plain values"):
        passes("def f(x): return x", problem, Limits())


def test_nothing_is_left_of_an_evaluation_that_was_killed() -> None:
    program = "import time\ntime.sleep(99)"
    code = "from anchorctx.evals.evaluators.reuse.config import Limits\n"
    code += "from anchorctx.evals.evaluators.reuse.tasks.sandbox import CodeProblem, passes\n"
    code += f"passes({program!r}, CodeProblem('def f():\\n', '', 'f'), Limits(wall_seconds=60))\n"
    evaluation = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    family = _wait(lambda: [p for child in _children(evaluation.pid) for p in (child, *_children(child))], 2)
    evaluation.send_signal(signal.SIGKILL)
    evaluation.wait()
    assert len(family) == 2
    assert not _wait(lambda: [p for p in family if _alive(p)], 0)


def _children(pid: int) -> list[int]:
    with suppress(FileNotFoundError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _alive(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _wait(look, count: int):  # noqa: ANN001, ANN202
    """What `look` finds, as soon as it has `count` items, or after 20 seconds."""
    end = time.monotonic() + 20
    while len(found := look()) != count and time.monotonic() < end:
        time.sleep(0.02)
    return found


# -- its parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [object(), len, iter([]), type, range(3), {1: object()}])
def test_what_is_not_plain_is_not_packed(value: object) -> None:
    with pytest.raises(TypeError, match="is no plain value"):
        values.pack(value)


@pytest.mark.parametrize(
    "content", [["eval", "1"], ["set", [["list", []]]], [], {}, ["dict", [1]], ["bytes", "x"], ["list", 3]]
)
def test_what_is_no_value_is_not_unpacked(content: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        values.unpack(content)


@pytest.mark.parametrize(("column", "header"), [(0, "x86_64-linux-gnu/asm/unistd_64.h"), (1, "asm-generic/unistd.h")])
def test_the_numbers_are_the_kernels(column: int, header: str) -> None:
    path = Path("/usr/include", header)
    if not path.is_file():
        pytest.skip("the kernel's headers are not installed")
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text(), re.MULTILINE)
    numbers = {{"fstatat": "newfstatat"}.get(name, name): int(number) for name, number in found}
    listed = confine.CALLS | {"openat": confine.OPENAT, "fcntl": confine.FCNTL}
    ours = {name: row[column] for name, row in listed.items() if row[column] is not None}
    assert ours == {name: numbers.get(name) for name in ours}


def test_jumps_stay_within_the_filter() -> None:
    """BPF counts from the next instruction; behind the last one there must be nothing to fall to."""
    for machine in confine.MACHINES:
        code = confine.instructions(machine)
        steps = list(struct.iter_unpack("=HBBI", code))
        jumps = [(i, max(yes, no)) for i, (kind, yes, no, _) in enumerate(steps) if kind in (0x15, 0x45)]
        assert len(jumps) > 50 and all(i + 1 + far < len(steps) for i, far in jumps)
        assert steps[-1] == (0x06, 0, 0, confine.REFUSE)
