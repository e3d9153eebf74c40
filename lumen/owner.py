"""Who owns out_dir: one process of one run, and why a start was refused.

A run has one owner: rank 0's process, from before anything in out_dir is touched until it ends.
`Owner` says how that holds after a kill -9, after a restart of the machine, and on a network file
system.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import socket
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

from lumen.errors import UserError
from lumen.files import read_json
from lumen.launch import environment, launch_id, parent, process, restarts

try:
    import fcntl
except ImportError:  # Windows: what stands in owner.json must do
    fcntl = None


BEAT = 30  # seconds between an owner's signs of life
STALE = 300  # seconds without one, after which an owner on another host counts as dead
GRACE = 3  # seconds that a first start waits for an owner who may be ending
SETTLE = 0.3  # seconds in which another start would show, where there are no locks


# real path of a folder: its owner in this process
OWNERS: weakref.WeakValueDictionary[str, Owner] = weakref.WeakValueDictionary()


class Owner:
    """The one who may write into `out`, as long as it holds out/owner.json: rank 0's process.

    Two things keep a second one out.
    - A lock (flock) on that file. The system gives it back however a process ends, so a kill -9
      blocks nobody. It binds all processes of a host, in whatever containers, and all hosts where
      the file system carries locks (NFS 4, GPFS, Lustre with flock).
    - What stands in the file: host, boot, pid and the process's start; and its age, for the owner
      touches it every BEAT seconds. Where no lock says more, an owner on this host is alive while
      that process is, one from before this host's last boot is not, and one on another host is
      alive until the file is older than STALE seconds, by the file system's own clock.
    So a host that went down blocks its run for STALE seconds, which a restart by torchrun or Slurm
    waits for. What this does not see: without shared locks, an owner who stood still for so long
    (stopped, a hanging disk) is taken for dead; it notices before its next checkpoint gets its name
    (`keep`).

    The file stays when the owner ends, without a pid: it says which launch came to own the folder
    last. In one process (a notebook) a Trainer that is not in fit() gives way to a newer one.
    """

    NAME = "owner.json"

    def __init__(self, out, main: bool = True):
        self.out, self.main = Path(out), main
        self.path = self.out / self.NAME
        self.found: dict = {}  # what stood there before
        self.working = False  # it trains: no other Trainer of this process takes the folder
        self.hold: Hold | None = None
        self.end = None  # gives the folder back; alive until then

    # ---- taking and giving back

    def take(self, say=print) -> None:
        """Owns the folder from now on, and makes it if need be. E300 where another does: nothing
        was changed then."""
        if not self.main:
            return
        # at a restart it is most likely our own predecessor
        wait = STALE + BEAT if restarts() else GRACE
        until, told = time.monotonic() + wait, False
        while other := self._try():
            if time.monotonic() > until:
                raise UserError("E300", f"{self.out} is in use by {other}: stop that one first")
            if not told and restarts():
                say(f"note       {self.out} is in use by {other}: waiting for its end")
            told = True
            time.sleep(min(0.2, wait))

    def _try(self) -> str | None:
        """Takes the folder, or says who has it."""
        key = os.path.realpath(self.out)
        if (other := OWNERS.get(key)) not in (None, self):
            if other.working:
                return f"another Trainer of this process, {os.getpid()}"
            other.release()
        while True:
            made = [folder for folder in (self.out, *self.out.parents) if not folder.exists()]
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                made += [] if self.path.exists() else [self.path]
                file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
            except OSError as error:
                raise UserError("E300", f"out_dir {self.out} cannot be written: {error}") from error
            locked, row = lock(file), read_json(self.path)
            if locked is False or alive(row, bool(locked), self.path):
                file.close()
                return describe(row)
            if same_file(file, self.path):
                break
            file.close()  # its maker was refused and has deleted it again
        mine = identity() | {"since": time.strftime("%Y-%m-%d %H:%M:%S"), "locked": bool(locked)}
        hold = Hold(file, self.path, mine | {"launch": row.get("launch")}, made)
        hold.write(json.dumps(hold.row).encode())
        if locked is None:
            time.sleep(SETTLE)
            if (now := read_json(self.path)) != hold.row:  # two at a time: the last to write has it
                file.close()
                return describe(now)
        self.found, self.hold = row, hold
        threading.Thread(target=hold.beat, name="owner", daemon=True).start()
        self.end = weakref.finalize(self, hold.give_back)
        OWNERS[key] = self
        return None

    def accept(self) -> None:
        """The start was not refused: the folder is this launch's from now on."""
        if self.main:
            self.hold.accept()

    def hold_on(self, say=print) -> None:
        """Before training: it may have been given back, or to a newer Trainer of this process."""
        if self.main and not self.end.alive:
            self.take(say)
            self.accept()

    def keep(self) -> None:
        """Before something gets its name: OSError where another has taken the folder meanwhile.
        What was deleted under the run is taken anew."""
        if not self.main:
            return
        row, ours = read_json(self.path), self.hold.row
        if any(row.get(key) != ours[key] for key in ("host", "space", "pid", "began")):
            if alive(row, False, self.path):
                raise OSError(errno.EBUSY, f"{self.out} is in use by {describe(row)}")
            self.release()
            try:
                self.take()
            except UserError as error:
                raise OSError(errno.EBUSY, error.text) from error
            self.accept()

    def release(self) -> None:
        if self.end:
            self.end()


class Hold:
    """What is held, apart from its Owner, so that it is given back when nobody has that any more.

    file, path: owner.json, open; row: what stands in it; made: folders and file that were not there
    before, which go again if the start is refused.
    """

    def __init__(self, file, path: Path, row: dict, made: list[Path]):
        self.file, self.path, self.row, self.made = file, path, row, made
        # what comes back if the start is refused; None: it was not
        self.before: bytes | None = os.pread(file.fileno(), 1 << 16, 0)
        self.stop = threading.Event()

    def write(self, data: bytes) -> None:
        """In place, for another file would not be locked. A full disk may not take it: then the
        lock alone must do."""
        with contextlib.suppress(OSError):
            os.pwrite(self.file.fileno(), data, 0)
            self.file.truncate(len(data))

    def accept(self) -> None:
        self.row["launch"], self.before = launch_id(), None
        self.write(json.dumps(self.row).encode())

    def beat(self) -> None:
        while not self.stop.wait(BEAT):
            with contextlib.suppress(OSError, ValueError):
                os.utime(self.file.fileno())

    def give_back(self) -> None:
        """Without a trace if the start was refused."""
        self.stop.set()
        if os.getpid() != self.row["pid"]:  # a fork of the owner ends
            return
        if self.before is None:
            self.write(json.dumps(self.row | {"pid": None}).encode())
        elif self.path not in self.made:
            self.write(self.before)
        elif same_file(self.file, self.path):
            with contextlib.suppress(OSError):
                self.path.unlink()
                for folder in self.made[:-1]:
                    folder.rmdir()
        self.file.close()


def owning(fit):
    """Decorator of Trainer.fit: the folder is this Trainer's for as long as it trains."""

    @functools.wraps(fit)
    def wrapped(self, *args, **options):
        self.owner.hold_on(self.say)
        self.owner.working = True
        try:
            return fit(self, *args, **options)
        finally:
            self.owner.working = False

    return wrapped


def identity() -> dict:
    """Which process this is, among all that may see the folder."""
    row = {
        "host": socket.gethostname(),
        "boot": "",
        "space": "",
        "pid": os.getpid(),
        "began": process(os.getpid()),
    }
    with contextlib.suppress(OSError):
        row["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        row["space"] = os.readlink("/proc/self/ns/pid")  # containers count their processes apart
    return row


def lock(file) -> bool | None:
    """True: it is ours now; False: another has it; None: this file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def alive(row: dict, locked: bool, path: Path) -> bool:
    """Whether the owner in `row` still is one, seen by a process that has the lock (`locked`) or
    cannot have it."""
    if not row.get("pid"):
        return False
    here = identity()
    if locked and row.get("locked") and row.get("boot") and row["boot"] == here["boot"]:
        return False  # one kernel keeps the locks of all its containers: it has taken this one back
    if row.get("host") == here["host"]:
        if row.get("boot") != here["boot"]:
            return False
        if row.get("space") == here["space"]:
            if row["pid"] == here["pid"] or (locked and row.get("locked")):
                return False  # ourselves, or the system has taken the lock back
            return process(row["pid"]) == row.get("began") if row.get("began") else runs(row["pid"])
    return age(path) < STALE


def runs(pid: int) -> bool:
    """For systems without /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def age(path: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system: hosts may differ."""
    now = time.time()
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=path.parent) as file:
        now = os.fstat(file.fileno()).st_mtime
    with contextlib.suppress(OSError):
        return now - path.stat().st_mtime
    return 0.0


def same_file(file, path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def describe(row: dict) -> str:
    if not row.get("pid"):
        return "a process that is just beginning or ending"
    return f"process {row['pid']} on {row.get('host')}, since {row.get('since')}"


def refused(error: UserError | None = None) -> str:
    """Why this launch was refused at its start, "" where it was not; with `error` that is written
    down. Not into out_dir, which may be another run's: into a file of torchrun's process, or the
    one slurm/train.sbatch looks at."""
    here = identity()
    # in containers torchrun is often process 1, and a folder for such files may be shared or kept
    place = f"{here['boot'][:8]}-{here['space'].strip('pid:[]')}"
    own = f"{tempfile.gettempdir()}/lumen-{os.getuid()}-{place}-{parent()}.refused"
    path = Path(os.environ.get("LUMEN_REFUSED") or own)
    with contextlib.suppress(OSError):
        if error is None:
            return path.read_text() if path.stat().st_uid == os.getuid() else ""
        if error.exit_code == 2 and "RANK" in os.environ:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
                f.write(str(error))
    return ""


def hopeless(out) -> dict | None:
    """At a restart: {code, reason} where an earlier start of this launch failed in a way that comes
    again."""
    if not restarts():
        return None
    if reason := refused():
        return {"code": 2, "reason": reason}
    with contextlib.suppress(OSError, ValueError):
        status = json.loads((Path(out) / "status.json").read_text())
        if status["state"] in ("diverged", "input_error") and again(
            read_json(Path(out) / Owner.NAME)
        ):
            return status
    return None


def not_restarted(status: dict) -> int:
    """Says what hopeless() found, and returns the code to end with."""
    if environment("RANK", 0) == 0:
        print(f"not restarted: {status['reason']}", file=sys.stderr, flush=True)
    else:  # torchrun ends all ranks as soon as one has: rank 0 must have said why by then
        time.sleep(5)
    return status["code"]


def again(row: dict) -> bool:
    """Whether this is a restart, and an earlier start of the same launch has come to own the folder
    of this `row`. Words that speak of its beginning (resume: none, overwrite) are obeyed then."""
    mine = launch_id()
    return restarts() > 0 and (not mine or row.get("launch") == mine)
