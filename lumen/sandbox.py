"""Python that a model wrote, run within limits: what pass@1 needs (Chen et al. 2021).

It is NOT a security boundary. It holds back what a model writes by accident: loops without an end,
memory, many processes, large files, programs that end before their tests. Code that means harm can
read what this user may read, change libraries that the tests use, and look for the secret below
that stands for a pass. Run models that you do not trust in a container or a machine of its own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from lumen.chat import visible
from lumen.errors import UserError

NOBODY = 65534
APART = ("--user", "--net", "--pid", "--fork", "--kill-child")  # of unshare(1)
LONGEST = 300  # bytes of a reason
PATIENCE = 3.0  # the clock may show so many times the CPU's seconds, on a busy machine


class Verdict(NamedTuple):
    passed: bool
    why: str = ""  # it did not


class Walls(NamedTuple):
    """What a program runs behind."""

    command: tuple[str, ...]  # that starts it: namespaces of its own
    user: int | None  # whom it runs as; None: as ourselves

    def said(self) -> str:
        apart = "without network" if self.command else "WITH the network: no namespaces here"
        user = "as this user"
        if self.user is not None:
            user = "as nobody"
        elif os.geteuid() == 0:
            user = "as ROOT, who may start any number of processes,"
        return f"code of the model runs {user} {apart}; this is no security boundary"


@functools.cache
def walls() -> Walls:
    """The highest that this machine allows, tried once. E003: code cannot be run at all."""
    unshare = shutil.which("unshare")
    commands = [()]
    if unshare:  # best with a /proc of its own: ours shows the environment of all our processes
        commands = [(unshare, *APART, "--mount-proc"), (unshare, *APART), ()]
    root = os.name == "posix" and os.geteuid() == 0
    users = [NOBODY, None] if root else [None]
    for command in commands:
        for user in users:
            found = Walls(command, user)
            with contextlib.suppress(OSError):
                if run_behind(found, {"code": "", "tests": "", "entry": ""}, 5, 1 << 29).passed:
                    return found
    text = f"{sys.executable} -I cannot be started within limits: tasks that run code need Linux"
    raise UserError("E003", f"{text} or macOS, and a folder for temporary files")


def run_python(
    code: str, tests: str = "", entry: str = "", seconds: float = 5, memory: int = 512 << 20
) -> Verdict:
    """Whether `tests` pass after `code`. They see its names, but none that hides one of Python's
    own, unless it is `entry`, which they are about. seconds: of CPU time; memory: bytes. E003."""
    return run_behind(walls(), {"code": code, "tests": tests, "entry": entry}, seconds, memory)


def run_behind(these: Walls, job: dict, seconds: float, memory: int) -> Verdict:
    """A process with a folder, a session and a group of its own; nothing of it is left."""
    secret = secrets.token_hex(16).encode()
    job = job | {"seconds": math.ceil(seconds), "memory": memory}
    # which libraries the interpreter itself needs may be said there
    env = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    with contextlib.ExitStack() as stack:
        keep = functools.partial(tempfile.TemporaryDirectory, ignore_cleanup_errors=True)
        folder = stack.enter_context(keep(prefix="lumen-code-"))
        given, verdict = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        given.write(secret + json.dumps(job).encode())
        given.flush()
        who = {}
        if these.user is not None:
            os.chown(folder, these.user, these.user)
            who = {"user": these.user, "group": these.user, "extra_groups": []}
        process = subprocess.Popen(
            # the folder is not read there: by it `end` knows the children
            [*these.command, sys.executable, "-I", "-c", program(), folder],
            stdin=given,
            stdout=verdict,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=env,
            start_new_session=True,
            **who,
        )
        late = False
        try:
            process.wait(PATIENCE * seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            end(process, folder)
        verdict.seek(0)
        said = verdict.read(LONGEST)
    if late:
        return Verdict(False, f"it was not done after {PATIENCE * seconds:g} s")
    if said == secret:
        return Verdict(True)
    text = visible(said.decode(errors="replace"))
    return Verdict(False, text or f"it ended before its tests did, with {process.returncode}")


def end(process: subprocess.Popen, folder: str) -> None:
    """Kill it with all its children, and wait until they are gone."""
    for _ in range(200):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = children(folder)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def children(folder: str) -> list[int]:
    """Processes that were started or forked for this folder, in whatever group they are."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if folder.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


# ---------------------------------------------------------------- within


@functools.cache
def program() -> str:
    """`within` as a text: the other user may not be allowed to read this file."""
    return f"{inspect.getsource(within)}\nwithin()\n"


def within() -> None:
    """What the interpreter there runs. stdin: 32 bytes that stand for a pass, then the job; stdout
    gets these bytes after the tests, or why not. Our own names are taken before code is run."""
    import builtins
    import json
    import os
    import resource
    import signal
    import sys
    import types

    given, verdict, nothing = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    job = json.loads(os.pread(given, os.fstat(given).st_size, 32))
    most = {"AS": job["memory"], "FSIZE": 1 << 20, "NOFILE": 64, "CORE": 0, "NPROC": 64}
    most = {name: (value, value) for name, value in most.items()}
    # one more for code that no handler interrupts, or that has taken ours away
    most["CPU"] = (job["seconds"], job["seconds"] + 1)
    for name, values in most.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), values)
        except (ValueError, OSError):  # it is lower already, or macOS does not know it
            pass
    own, run = dict(vars(builtins)), exec
    read, write, leave = os.pread, os.write, os._exit

    def too_long(number, frame):
        write(verdict, f"more than {job['seconds']} s of CPU time".encode())
        leave(1)

    signal.signal(signal.SIGXCPU, too_long)
    try:
        tests = compile(job["tests"], "tests", "exec")
        module = types.ModuleType("answer")
        sys.modules["answer"] = module
        names = vars(module)
        run(compile(job["code"], "answer", "exec"), names)
        seen = {name: value for name, value in names.items() if name not in own}
        if job["entry"]:
            seen[job["entry"]] = names[job["entry"]]
        run(tests, seen | {"__builtins__": own})
    except BaseException as error:  # SystemExit, too
        write(verdict, f"{type(error).__name__}: {error}".encode())
        leave(1)
    write(verdict, read(given, 32, 0))
    leave(0)
