"""lumen/sandbox.py: only tests that ran pass, nothing of a program is left, we are still here."""

import os
import shutil
import sys
import time

import pytest

from lumen import sandbox
from lumen.sandbox import Walls, run_python, walls

RIGHT = "def f(x):\n    return x + 1\n"
WRONG = "def f(x):\n    return 0\n"
TESTS = "def check(f):\n    assert f(1) == 2 and abs(f(2) - 3) < 1e-6\ncheck(f)\n"
NAKED = Walls((), None)  # what is left where the kernel allows nothing


@pytest.fixture
def left(monkeypatch):
    """What is left of the programs that ran: processes and folders."""
    folders = []
    end = sandbox.end

    def spy(process, folder):
        folders.append(folder)
        end(process, folder)

    monkeypatch.setattr(sandbox, "end", spy)

    def found():
        assert folders
        here = [folder for folder in folders if os.path.exists(folder)]
        return here + [pid for folder in folders for pid in sandbox.children(folder)]

    return found


def test_right_passes_and_wrong_does_not(left):
    assert run_python(RIGHT, TESTS, "f") == (True, "")
    passed, why = run_python(WRONG, TESTS, "f")
    assert not passed and why.startswith("AssertionError")
    passed, why = run_python("def g(): pass", TESTS, "f")
    assert not passed and why == "KeyError: 'f'"
    passed, why = run_python("def f(:\n", TESTS, "f")
    assert not passed and why.startswith("SyntaxError")
    assert not left()


CHEATS = {
    "sys.exit": (RIGHT + "import sys\nsys.exit(0)", "SystemExit: 0"),
    "sys.exit when asked": ("import sys\ndef f(x): sys.exit(0)", "SystemExit: 0"),
    "os._exit": (RIGHT + "import os\nos._exit(0)", "it ended before its tests did, with 0"),
    "os._exit when asked": ("import os\ndef f(x): os._exit(0)", "it ended before its tests did"),
    "exec": ("import os\nos.execv('/bin/true', ['true'])", "it ended before its tests did, with 0"),
    "marker": ("import os\nos.write(1, b'passed')\nos._exit(0)", "it ended before its tests did"),
    "all descriptors": (
        "import os\nfor fd in range(64):\n  try: os.write(fd, b'0' * 32)\n"
        "  except OSError: pass\nos._exit(0)",
        "0" * 32,
    ),
    "builtins": ("import builtins\nbuiltins.abs = lambda x: 0\ndef f(x): return 2", "Assertion"),
    "our builtins": ("__builtins__['abs'] = lambda x: 0\ndef f(x): return 2", "Assertion"),
    "a name of Python's": ("abs = lambda x: 0\ndef f(x): return 2", "AssertionError"),
    "AssertionError": (
        "import builtins\nbuiltins.AssertionError = str\n" + WRONG,
        "AssertionError",
    ),
    "check": ("def check(f): pass\n" + WRONG, "AssertionError"),
    "exec of ours": ("import builtins\nbuiltins.exec = lambda *a: None\n" + WRONG, "Assertion"),
    "excepthook": ("import sys\nsys.excepthook = lambda *a: None\n" + WRONG, "AssertionError"),
    "loses its reason": (
        "class E(Exception):\n  def __str__(self): raise SystemExit(0)\nraise E",
        "it ended before its tests did",
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_who_ends_before_the_tests_or_changes_them_does_not_pass(name):
    code, reason = CHEATS[name]
    passed, why = run_python(code, TESTS, "f")
    assert not passed and why.startswith(reason)


HUNGRY = {
    "loop": ("while True: pass", "it was not done after 0.3 s"),
    "sleep": ("import time\ntime.sleep(60)", "it was not done after 0.3 s"),
    "output": ("while True: print('x' * 100_000)", "it was not done after 0.3 s"),
    "reason": ("raise ValueError('x' * 1_000_000)", "ValueError: xxx"),
    "memory": ("x = bytearray(1 << 30)", "MemoryError"),
    "memory in steps": ("x = []\nwhile True: x.append(bytearray(1 << 24))", "MemoryError"),
    "file": ("for _ in 'ab': open('x', 'ab', 0).write(bytes(1 << 20))", "OSError"),
    "files": ("x = [open('x', 'wb') for _ in range(100)]", "OSError: [Errno 24]"),
    "recursion": ("def f(x): return f(x)", "RecursionError"),
    "input": ("input()", "EOFError"),
    "crash": ("import ctypes\nctypes.string_at(0)", "it ended before its tests did, with -11"),
}


@pytest.mark.parametrize("name", HUNGRY)
def test_who_takes_more_than_its_share_is_stopped(name, left):
    code, reason = HUNGRY[name]
    seconds = 0.1 if "not done" in reason else 5
    began = time.perf_counter()
    passed, why = run_python(code, TESTS, "f", seconds, 128 << 20)
    assert not passed and why.startswith(reason) and len(why) <= sandbox.LONGEST
    assert not left()
    assert time.perf_counter() - began < 5


FORKS = """
import os, time
for _ in range(20):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
"""


@pytest.mark.parametrize("behind", [None, NAKED])
def test_no_child_is_left_whatever_group_it_is_in(behind, left):
    job = {"code": FORKS + RIGHT, "tests": TESTS, "entry": "f"}
    assert sandbox.run_behind(behind or walls(), job, 5, 1 << 29).passed
    assert not left()
    job = {"code": FORKS + "while True: pass", "tests": TESTS, "entry": "f"}
    assert not sandbox.run_behind(behind or walls(), job, 0.2, 1 << 29).passed
    assert not left()


def test_a_program_sees_an_empty_folder_and_no_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONSTARTUP", "x")
    code = "import os, sys\nassert os.listdir() == [] and os.getcwd() != '/'\n"
    code += "assert set(os.environ) <= {'PATH', 'LD_LIBRARY_PATH', 'LC_CTYPE'}, os.environ\n"
    code += "assert sys.flags.isolated and 'lumen' not in sys.modules\n"
    assert run_python(code + RIGHT, TESTS, "f") == (True, "")


def test_what_a_program_may_do():
    """Classes, annotations, imports, helpers that the tests use; an entry that hides a name of
    Python's."""
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\nimport math\n"
    code += "@dataclass\nclass P:\n    x: int\ndef helper(x): return math.floor(x)\n"
    code += "def sum(x): return P(helper(x))\n"
    assert run_python(code, "assert sum(2.5) == P(2) and helper(3.5) == 3", "sum") == (True, "")
    assert not run_python("", "assert sum([2]) == 2", "sum").passed  # Python's own is no answer
    main = "if __name__ == '__main__':\n    raise SystemExit\n"
    assert run_python(RIGHT + main, TESTS, "f") == (True, "")


# only behind a namespace: without one these would reach us, or the network
KILLS = "import os, signal\nfor target in (0, -1):\n  try: os.kill(target, signal.SIGKILL)\n"
KILLS += "  except OSError: pass\ntry: os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)\n"
KILLS += "except OSError: pass\n"
CONNECTS = "import socket\nsocket.create_connection(('127.0.0.1', {}), 1)\n"


@pytest.mark.skipif(not shutil.which("unshare"), reason="there is no unshare")
def test_the_others_and_the_network_are_out_of_reach(left):
    if not walls().command:
        pytest.skip("no namespaces here")
    import socket

    run_python(KILLS + WRONG, TESTS, "f")
    with socket.create_server(("127.0.0.1", 0)) as server:
        passed, why = run_python(CONNECTS.format(server.getsockname()[1]), "")
    assert not passed and why.startswith("OSError: [Errno 101]")
    if "--mount-proc" in walls().command:  # nor is what is in our environment
        code = "import os\nassert [name for name in os.listdir('/proc') if name.isdigit()] == ['1']"
        assert run_python(code) == (True, "")
    assert not left()


def test_it_says_what_it_could_not_close(monkeypatch):
    assert "WITH the network" in NAKED.said() and "no security boundary" in NAKED.said()
    assert "as nobody without network" in Walls(("unshare",), sandbox.NOBODY).said()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "as ROOT" in NAKED.said()
    sandbox.walls.cache_clear()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(sandbox.UserError, match="E003.*/nowhere/python"):
        walls()
    sandbox.walls.cache_clear()


@pytest.mark.nightly
@pytest.mark.parametrize("behind", [None, NAKED])
def test_a_fork_bomb_is_gone_after_its_time(behind, left):
    bomb = "import os\nfor _ in range(9):\n  try: os.fork()\n  except OSError: pass\n"
    job = {"code": bomb, "tests": TESTS, "entry": "f"}
    began = time.perf_counter()
    assert not sandbox.run_behind(behind or walls(), job, 1, 1 << 29).passed
    assert not left()
    assert time.perf_counter() - began < 60


@pytest.mark.nightly
@pytest.mark.parametrize("behind", [None, NAKED])
def test_cpu_time_counts_not_the_clock(behind, monkeypatch):
    """So that a busy machine changes no score."""
    monkeypatch.setattr(sandbox, "PATIENCE", 60)
    ignores = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
    for first, reason in (("", "more than 1 s of CPU time"), (ignores, "it ended before")):
        job = {"code": f"{first}while True: pass", "tests": "", "entry": ""}
        passed, why = sandbox.run_behind(behind or walls(), job, 1, 1 << 29)
        assert not passed and why.startswith(reason)
