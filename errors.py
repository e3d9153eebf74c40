"""Every error a user can cause: its code, what it means, what to do. README's troubleshooting is `python errors.py`.

Raise `UserError(code, text)`; text names the file, the line, the value and the remedy at hand. `command(main)` turns it
into one message and an exit code: 2 the user's input, 3 diverged, 75 please restart; 1 stays for our own bugs.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import reprlib
import signal
import sys
import time

ERRORS = {  # code: (meaning, remedy)
    "E001": ("no such configuration file or preset", "ls configs/ shows the presets; your own YAML works too"),
    "E002": ("a key, an option or a value cannot be", "--help behind the command lists all of them with their ranges"),
    "E003": ("the hardware or a package cannot do what was asked", "python plan.py env shows what this machine can do"),
    "E101": ("a row is not a JSON object", "one JSON object a line for .jsonl, a list of objects for .json"),
    "E102": ("a row lacks its text field, or the field has another type", "rows look like {\"text\": \"...\"}"),
    "E103": ("text is not valid UTF-8", "convert the file to UTF-8, for instance with iconv"),
    "E104": ("a file or a text is empty", "remove the row or the file"),
    "E107": ("a text occurred before (exact duplicate)", "nothing to do: the first one is kept"),
    "E108": ("a file cannot be read", "check its path, permissions and format"),
    "E109": ("too many bad rows, or nothing left", "see rejected.jsonl in the output folder; mend or allow them"),
    "E110": ("data not found or not finished", "make it with prepare_data.py, or add a prepare: key to the YAML"),
    "E111": ("a shard is damaged or changed under the run", "restore it, or prepare the data again"),
    "E112": ("a file is no token shard of ours", "shards are 1-D .npy files of uint16 or uint32; see prepare_data.py"),
    "E113": ("data, tokenizer and model do not fit together", "use the vocab_size and tokenizer of the data"),
    "E114": ("too little data for one row", "lower model.max_seq_len or bring more text"),
    "E115": ("a tokenizer's file is not on this machine", "put the file where the message says, or use bpe:8192"),
    "E116": ("a tokenizer.json of a kind Lumen does not read", "only byte-level BPE; the message names what differs"),
    "E117": ("the output folder holds something else", "choose another folder with --out, or prepare: {out: ...}"),
    "E118": ("the data is not what the checkpoint was trained on", "restore it, allow_data_change, or a new out_dir"),
    "E119": ("data could not be written", "free some disk space and start again: it goes on where it was"),
    "E200": ("the run does not fit into memory", "take what the message names; --dry_run shows what each choice needs"),
    "E201": ("memory ran out inside a collective or the optimizer", "start again: it goes on with smaller ones"),
    "E300": ("out_dir holds a run, or is in use", "resume: auto goes on with a run that has ended; or change out_dir"),
    "E301": ("the loss diverged", "lower learning_rate, or resume from an earlier checkpoint"),
    "E302": ("gradients overflow at every step", "use precision mixed_bf16 or fp32, or lower learning_rate"),
    "E303": ("a checkpoint is damaged", "use another step of the run: python checkpoint.py OUT_DIR lists them"),
    "E304": ("no checkpoint there", "python checkpoint.py OUT_DIR lists what there is"),
    "E305": ("the checkpoint does not fit the model", "take the model: block of its config.yaml, or another --out_dir"),
    "E306": ("the checkpoint is of another version", "use the Lumen version that wrote it"),
    "E307": ("a checkpoint could not be written", "free some disk space; the run goes on and tries again"),
    "E308": ("experts or depth cannot be changed so", "see model.n_experts_max and the message; nothing was changed"),
    "E309": ("a command cannot be carried out", "see the message; nothing was changed, the run goes on"),
    "E310": ("decisions.jsonl cannot be replayed", "take the file of a run with this seed, model, data and batch"),
    "E400": ("this model has no Hugging Face architecture", "norm_order: pre, and no option the message names"),
    "E401": ("the folder or file cannot be imported", "Llama, Qwen3, Mixtral, Qwen3Moe, Dots1 folders; a Lunaris .pt"),
    "E402": ("exported and original model disagree", "report it with EXPORT.json: this is a bug"),
    "E403": ("an export or import could not be written", "free some disk space and start it again"),
    "E500": ("a prompt or sampling option cannot work", "python sample.py --help shows the ranges"),
    "E501": ("no tokenizer to read and write text with", "pass --tokenizer FILE, or token ids with --ids"),
    "E600": ("the processes disagree", "start them with the same files, versions and command"),
    "E601": ("another process of the run was lost", "start again, as torchrun --max-restarts does: it resumes"),
}  # fmt: skip
EXIT_CODES = {"E301": 3, "E201": 75, "E601": 75}  # every other UserError exits with 2


class UserError(Exception):
    """A mistake of the user's or the machine's, not ours. `code`: a key of ERRORS; `text`: where, what and how."""

    def __init__(self, code: str, text: str):
        assert code in ERRORS, code
        super().__init__(code, text)  # both, so that it survives pickling between processes
        self.code, self.text = code, text
        self.exit_code = EXIT_CODES.get(code, 2)

    def __str__(self) -> str:
        return f"{self.code}: {self.text}\n  {ERRORS[self.code][0]}; {ERRORS[self.code][1]}"


def expand(path: str, where: str = "") -> str:
    """A path that a user wrote, with ~ and $NAME replaced; E002 for a $NAME that is not set, else there would soon be a
    folder called $NAME. `where` it was written comes before that."""
    whole = os.path.expanduser(os.path.expandvars(path))
    if (unset := re.search(r"\$\w+|\$\{\w+\}", whole)) and not os.path.exists(whole):
        raise UserError("E002", f"{where and f'{where}: '}{path}: {unset[0]} is not set")
    return whole


class Words(argparse.ArgumentParser):
    """The command line of a command: - and _ in an option's name are the same, nothing is abbreviated, and a mistake
    is UserError E002 with the nearest option instead of a page of usage."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        words = [word.partition("=") for word in (sys.argv[1:] if args is None else args)]
        words = [(w.replace("-", "_").replace("__", "--", 1) if w[:2] == "--" else w) + eq + v for w, eq, v in words]
        return super().parse_known_args(words, namespace)

    def error(self, message: str):
        wrong = [word for word in message.split() if word.startswith("--")] if "unrecognized" in message else []
        known = list(self._option_string_actions)  # private, and as old as argparse
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                known += [name for parser in action.choices.values() for name in parser._option_string_actions]
        near = [nearest(word.partition("=")[0], known) for word in wrong]
        hints = ", ".join(dict.fromkeys(name for name in near if name))
        text = f"{message}; did you mean {hints}?" if hints else message
        raise UserError("E002", f"command line: {self.prog}: {text}")


def nearest(word: str, names) -> str | None:
    """The one of `names` that `word` is a misspelling or the beginning of; None where none is near."""
    begun = [name for name in names if len(word.strip("-")) > 3 and name.startswith(word)]
    return next(iter(begun + difflib.get_close_matches(word, list(names), 1, 0.75)), None)


def no_path(text: str) -> str:
    """Why `text` can be the name of no file, whether one is there or not: too long, a NUL in it; else ""."""
    try:
        os.lstat(text)
    except (FileNotFoundError, PermissionError):
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return ""


def a_path(text: str) -> str:
    """A word of a command line that names a file or folder: `type=` of an argument."""
    if reason := no_path(text):
        raise argparse.ArgumentTypeError(f"{reprlib.repr(text)}: {reason}")
    return text


def environment(name: str, default: int) -> int:
    """A whole number that a launcher leaves in the environment, RANK for example. E600 names what is none."""
    value = os.environ.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise UserError("E600", f"{name}={value!r} in the environment is no number; unset {name}, or use torchrun")
    return int(value)


def check_launch() -> None:
    """E600 where what a launcher leaves in the environment cannot be: half of it is there, or a rank too many."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    for name in (*names, "SLURM_RESTART_COUNT"):
        environment(name, 0)
    rank, world = environment("RANK", 0), environment("WORLD_SIZE", 1)
    if not rank < world:
        text = f"RANK={rank} and WORLD_SIZE={world} in the environment: the last rank is {world - 1}"
        raise UserError("E600", f"{text}; unset both for one process, or use torchrun")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world > 1 and missing:
        text = f"WORLD_SIZE={world} in the environment without {', '.join(missing)}"
        raise UserError("E600", f"{text}: unset WORLD_SIZE for one process, or start all of them with torchrun")


class Console:
    """stdout or stderr of a program whose work is not what it says: a pipe that was closed, a terminal that went, a
    full disk take the words and nothing else."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


def print_now(text: str) -> None:
    print(text, flush=True)


def speak(text: str, write=print_now) -> None:
    """One line to the console, as far as it takes it; whatever becomes of it, who speaks goes on."""
    with contextlib.suppress(OSError, ValueError):
        try:
            write(text)
        except UnicodeError:
            write(text.encode("ascii", "backslashreplace").decode())


def open_console(lasting: bool) -> None:
    """A letter that the console does not have is written as \\x.., never an error."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:  # closed by who started us: else the next file opened would be taken for it
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Console(stream) if lasting else stream)


def command(main, lasting: bool = False) -> None:
    """Run `main(argv) -> exit code or None` as a program. Under torchrun rank 0 speaks, and first; another
    rank only where rank 0 has nothing to say. `lasting`: its work goes on whatever becomes of the console."""
    open_console(lasting)
    rank = 0
    try:
        rank = environment("RANK", 0)
        code = main(sys.argv[1:]) or 0
    except UserError as error:
        code = error.exit_code
        if rank == 0 or error.code == "E601":  # rank 0 may be the one that was lost
            print(f"error {error}", file=sys.stderr)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the trainer's handler would let it sleep on
            # torchrun ends all ranks of a host as soon as one has failed: rank 0 must have said why by then, and where
            # there is no rank 0 one is enough
            local = os.environ.get("LOCAL_RANK", "")
            time.sleep(5 + (int(local) if local.isdigit() else 0))
            print(f"rank {rank}: error {error}", file=sys.stderr)  # nobody has ended us: only this rank knows
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `| head` closed our output
        if lasting:  # not ours, for that raises nothing: a service, another process
            raise
        code = 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk, a closed pipe; Python would try again and make it exit code 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if "RANK" in os.environ:
        os._exit(code)  # gloo's threads can abort the process in its own exit handlers although all work is done
    sys.exit(code)


if __name__ == "__main__":
    print("| code | means | do |\n|---|---|---|")
    print("\n".join(f"| {code} | {meaning} | {remedy} |" for code, (meaning, remedy) in ERRORS.items()))
