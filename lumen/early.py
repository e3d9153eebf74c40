"""Ctrl-C in the first seconds of a command, while torch is being imported: it ends at once, 130 in
a shell, without a traceback. Each command imports this first, most of them through lumen.waiting.
"""

from __future__ import annotations

import os
import signal
import sys

COMMANDS = ("train", "train_fsdp", "finetune", "sample", "evaluate", "prepare_data", "export")
COMMANDS += ("serve", "journey")


def is_command(path: str | None) -> bool:
    """Whether the program is one of ours. Another one that imports them is not to end like that:
    it may never come to `listen`."""
    here, name = os.path.split(os.path.realpath(path or ""))
    ours = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    return here == ours and name.removesuffix(".py") in COMMANDS


def end_at_once() -> None:
    """From now on Ctrl-C ends the process without asking Python: an exception in the middle of an
    import of numpy comes out as another error. What ignores Ctrl-C goes on to."""
    ours = is_command(getattr(sys.modules["__main__"], "__file__", None))
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def listen() -> None:
    """From now on Ctrl-C is KeyboardInterrupt again, for what was begun has an end of its own."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


end_at_once()
