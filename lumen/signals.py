"""Signals: SIGTERM, SIGINT and SIGHUP end a run in order, SIGUSR1 asks for a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import time

AT_ONCE_AFTER = 2  # seconds from the first Ctrl-C, after which another one leaves at once


class Signals:
    """What this rank has heard. The ranks learn of it from the flags that travel with the sums of a
    step, so that all of them stop after the same one."""

    def __init__(self, speaks: bool):
        self.speaks = speaks  # rank 0
        self.stop = 0  # 1: a signal, 2: a command
        self.save = 0
        self.first_interrupt: float | None = None  # when Ctrl-C came

    def listen(self) -> None:
        """From now on. Only in a main thread, and only what this system knows."""
        names = ["SIGTERM", "SIGINT"]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            names.append("SIGHUP")  # else nohup has said that it shall be ignored
        if "RANK" not in os.environ:  # torchrun dies of it and leaves its workers behind
            names.append("SIGUSR1")
        for name in names:
            with contextlib.suppress(ValueError, AttributeError):
                signal.signal(getattr(signal, name), self.heard)

    def heard(self, number: int, frame) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self.save = 1
            return
        if number == signal.SIGINT:
            self.interrupted()
        self.stop = self.stop or 1

    def interrupted(self) -> None:
        """Ctrl-C ends the run in order, a second one at once.

        One that follows within two seconds is the same one: it came by way of torchrun too.
        """
        now = time.monotonic()
        if self.first_interrupt is None:
            self.first_interrupt = now
            if self.speaks:
                text = "stopping after this step and saving; Ctrl-C again leaves at once"
                with contextlib.suppress(OSError):  # no print: it may be what was interrupted
                    os.write(2, f"\n{text}, without saving\n".encode())
        elif now - self.first_interrupt > AT_ONCE_AFTER:
            os._exit(130)
