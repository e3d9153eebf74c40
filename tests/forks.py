"""Programs and ranks without the seconds that a start costs: one process imports torch and the
trainer, and forks them.

The same as conftest.run_python to whoever looks at their output, their exit and their files. What a
test says of torchrun (restarts, signals that it hands on, launch lines) or of a start itself needs
a real one."""

import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from pathlib import Path

import conftest

SERVERS = []  # of this pytest process: (process, our end of the socket)
PATIENCE = 10  # seconds between TERM and KILL for the ranks of one that failed


def run_forked(*words, ranks=0, timeout=120, **env) -> subprocess.CompletedProcess:
    """`python words...`, as so many ranks of one host; returncode: 1 if any of several failed, as
    torchrun's."""
    if not SERVERS:
        SERVERS.append(start())
    server, sock = SERVERS[0]
    env = {k: v for k, v in (os.environ | env).items() if v is not None}
    pipes = [os.pipe(), os.pipe()]
    launch = (
        uuid.uuid4().hex
    )  # as torchrun gives each a name; why it was refused is written there, not for the next
    refused = Path(tempfile.gettempdir(), f"lumen-tests-{launch}.refused")
    env |= {"LUMEN_REFUSED": str(refused)}
    if ranks:
        env |= {"TORCHELASTIC_RUN_ID": launch, "TORCHELASTIC_RESTART_COUNT": "0"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        env |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    job = {"words": [str(w) for w in words], "ranks": ranks, "env": env}
    socket.send_fds(sock, [json.dumps(job).encode()], [write for _, write in pipes])
    said = [b"", b""]

    def read(i):
        os.close(pipes[i][1])
        with open(pipes[i][0], "rb") as file:
            said[i] = file.read()

    readers = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for reader in readers:
        reader.start()
    sock.settimeout(timeout)
    late = False
    try:
        answer = sock.recv(1 << 16)
    except TimeoutError:
        late = True
        conftest.end_orphans()
        sock.settimeout(PATIENCE)
        answer = sock.recv(1 << 16)
    for reader in readers:
        reader.join()
    refused.unlink(missing_ok=True)
    out, err = (text.decode(errors="replace") for text in said)
    if late:
        raise subprocess.TimeoutExpired(words, timeout, out, err)
    codes = json.loads(answer)
    return subprocess.CompletedProcess(words, int(any(codes)) if ranks else codes[0], out, err)


def start():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = os.environ | {"PYTHONPATH": f"{conftest.ROOT}:{conftest.ROOT}/tests"}
    # tensors of a megabyte and more go back to the system when freed: what a rank holds can be
    # measured
    env |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, __file__, str(theirs.fileno())]
    process = subprocess.Popen(command, cwd=conftest.ROOT, env=env, pass_fds=[theirs.fileno()])
    theirs.close()
    return process, ours


def stop() -> None:
    while SERVERS:
        process, sock = SERVERS.pop()
        sock.close()  # it ends at that
        process.wait(PATIENCE)


def free_port() -> int:
    """Below what the system hands out by itself: nobody takes it between this look and its use."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
                return port
            except OSError:
                pass


# ---------------------------------------------------------------- the process that forks


def serve(sock) -> None:
    import_all()
    while True:
        message, pipes, _, _ = socket.recv_fds(sock, 1 << 20, 2)
        if not message:
            return
        job = json.loads(message)
        left = set()
        for rank in range(max(1, job["ranks"])):
            pid = os.fork()
            if not pid:
                sock.close()
                become(job, rank, pipes)
            left.add(pid)
        for pipe in pipes:
            os.close(pipe)
        sock.send(json.dumps(wait(left)).encode())


def import_all() -> None:
    """What a run imports, at its first step too."""
    import pytest  # noqa: F401
    import rig  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401 - the first step of an optimizer asks for it

    import export  # noqa: F401
    import sample  # noqa: F401
    import tools.bench  # noqa: F401
    import train_fsdp  # noqa: F401
    from lumen import machine

    machine.matrix_peak("cpu", torch.float32)  # the forks know it


def wait(left: set[int]) -> list[int]:
    """The exit codes of these children, below 0 for signals; those of a rank that failed are ended,
    as torchrun does."""
    codes, kill_at = {}, None
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            if kill_at and time.monotonic() > kill_at:
                end(left, signal.SIGKILL)
            time.sleep(0.005)
            continue
        left.discard(pid)
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] and left and not kill_at:
            kill_at = time.monotonic() + PATIENCE
            end(left, signal.SIGTERM)
    return [codes[pid] for pid in sorted(codes)]


def end(pids, number) -> None:
    for pid in pids:
        os.kill(pid, number)


def become(job, rank, pipes) -> None:
    """This fork is from now on the program that the job names; it does not return."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd, pipe in enumerate(pipes, 1):
            os.dup2(pipe, fd)
            os.close(pipe)
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)
        os.environ.clear()
        os.environ.update(job["env"])
        if job["ranks"]:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        sys.argv = job["words"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
