"""Every error that a user can cause: its code, what it means, what to do.

Raise `UserError(code, text)`; text names the file, the line, the value and the remedy at hand.
`launch.command(main)` turns it into one message and an exit code: 2 the user's input, 3 diverged,
75 please restart; 1 stays for our own bugs. docs/errors.md is what `python -m lumen.errors` prints.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import reprlib

# fmt: off
ERRORS = {  # code: (meaning, remedy)
    "E001": ("no such configuration file or preset",
             "ls configs/ shows the presets; your own YAML works too"),
    "E002": ("a key, an option or a value is wrong",
             "--help behind the command lists all of them with their ranges"),
    "E003": ("the hardware or a package cannot do what was asked",
             "python -m lumen.machine shows what this machine can do"),
    "E101": ("a row is not a JSON object",
             "one JSON object a line for .jsonl, a list of objects for .json"),
    "E102": ("a row lacks its text field, or the field has another type",
             'rows are {"text"}, {"messages"}, {"prompt", "response"}, {"instruction", "output"},'
             ' {"question", "answer"} or {"prompt", "chosen", "rejected"}'),
    "E103": ("text is not valid UTF-8",
             "convert the file to UTF-8, for instance with iconv"),
    "E104": ("a file or a text is empty",
             "remove the row or the file"),
    "E105": ("a conversation's roles are wrong: one is unknown, two in a row are alike, no reply",
             "roles are system, user, assistant and their usual names; it ends with a reply"),
    "E106": ("a conversation is too long, or nothing in it is left to learn",
             "raise the rows' length, or choose what is done with long ones"),
    "E107": ("a text occurred before (exact duplicate)",
             "nothing to do: the first one is kept"),
    "E108": ("a file cannot be read",
             "check its path, permissions and format"),
    "E109": ("too many bad rows, or nothing left",
             "see rejected.jsonl in the output folder; mend or allow them"),
    "E110": ("data not found or not finished",
             "make it with prepare_data.py, or add a prepare: key to the YAML"),
    "E111": ("a shard is damaged or changed under the run",
             "restore it, or prepare the data again"),
    "E112": ("a file is not a token shard of Lumen's",
             "shards are 1-D .npy files of uint16 or uint32; see prepare_data.py"),
    "E113": ("data, tokenizer and model do not fit together",
             "use the vocab_size and tokenizer of the data"),
    "E114": ("too little data for one row",
             "lower model.max_seq_len or bring more text"),
    "E115": ("a tokenizer's file is not on this machine",
             "put the file where the message says, or use bpe:8192"),
    "E116": ("a tokenizer that Lumen cannot run",
             "see what the message names; bpe:8192 trains one here"),
    "E117": ("the output folder holds something else",
             "choose another: --out of prepare_data.py, --prepare.out of a run"),
    "E118": ("the data is not what the checkpoint was trained on",
             "restore it, allow_data_change, or a new out_dir"),
    "E119": ("data could not be written",
             "free some disk space and start again: it goes on where it was"),
    "E120": ("rows or sources of different kinds in one dataset: text, chat, pairs",
             "prepare each kind into a folder of its own"),
    "E121": ("a compressed or columnar file is truncated or damaged",
             "copy it anew; --max_bad 1 takes what was read before the damage"),
    "E122": ("a compressed file unpacks to more than the limit",
             "unpack it, and look at what is in it"),
    "E123": ("the data was packed for rows of another length",
             "set model.max_seq_len to it, or prepare the data anew with --seq_len"),
    "E124": ("data of a kind that this command does not train on",
             "train.py takes text and conversations; see the message"),
    "E125": ("there is nothing to fine-tune, or nothing to do it with",
             "python finetune.py BASE --data FILE; BASE is a run, a step or a Hugging Face folder"),
    "E126": ("preference data: no pairs, no difference, or none that fits a row",
             "see the message; prepare the pairs anew, or raise model.max_seq_len"),
    "E127": ("an evaluation's task is unknown, its file is missing, or a row of it is wrong",
             "see the message; docs/evaluation.md has all tasks (val:DIR too), their files' forms"),
    "E128": ("results of evaluations cannot be compared, or not be continued",
             "see the message; another --out begins anew"),
    "E200": ("the run does not fit into memory",
             "take what the message names; --dry_run shows what each choice needs"),
    "E201": ("memory ran out inside a collective or the optimizer",
             "start again: it goes on with smaller ones"),
    "E300": ("out_dir holds a run, or is in use",
             "resume: auto goes on with a run that has ended; or change out_dir"),
    "E301": ("the loss diverged",
             "lower learning_rate, or resume from an earlier checkpoint"),
    "E302": ("gradients overflow at every step",
             "use precision mixed_bf16 or fp32, or lower learning_rate"),
    "E303": ("a checkpoint is damaged",
             "use another step of the run: python -m lumen.checkpoint OUT_DIR lists them"),
    "E304": ("no checkpoint there",
             "python -m lumen.checkpoint OUT_DIR lists what there is"),
    "E305": ("the checkpoint does not fit the model",
             "take the model: block of its config.yaml, or another --out_dir"),
    "E306": ("the checkpoint is of another version",
             "use the Lumen version that wrote it"),
    "E307": ("a checkpoint could not be written",
             "free some disk space; the run goes on and tries again"),
    "E308": ("experts or depth cannot be changed like this",
             "see model.n_experts_max and the message; nothing was changed"),
    "E309": ("a command cannot be carried out",
             "see the message; nothing was changed, the run goes on"),
    "E310": ("decisions.jsonl cannot be replayed",
             "take the file of a run with this seed, model, data and batch"),
    "E311": ("adapters and their base do not go together",
             "bring back the base they were made for; the message names both"),
    "E312": ("the reference log-probabilities are of other data, another base or precision",
             "go on with what the run began with, or a new out_dir computes them anew"),
    "E400": ("this model has no Hugging Face architecture",
             "change the keys that the message names; norm_order: pre"),
    "E401": ("the folder or file cannot be imported",
             "Llama, Qwen3, Mixtral, Qwen3Moe, Dots1 folders; a Lunaris .pt"),
    "E402": ("exported and original model disagree",
             "report it with EXPORT.json: this is a bug"),
    "E403": ("an export or import could not be written",
             "free some disk space and start it again"),
    "E404": ("this model cannot be written in that format",
             "see the message; python export.py to_hf takes more kinds of models"),
    "E405": ("in so few bits the model loses more than was allowed",
             "--method gptq, more --bits, or a larger --max_loss"),
    "E500": ("a prompt or sampling option cannot work",
             "python sample.py --help shows the ranges"),
    "E501": ("no tokenizer to read and write text with",
             "pass --tokenizer FILE, or token ids with --ids"),
    "E502": ("a prompt and its reply do not fit into the model's context",
             "shorten the messages, or ask for fewer tokens"),
    "E503": ("the server is full, closing, or took too long",
             "ask again after Retry-After seconds; --slots and --queue raise what it takes"),
    "E504": ("the server may not be used, or opened, like this",
             "send Authorization: Bearer KEY; --host beyond 127.0.0.1 needs --api_key"),
    "E505": ("a request that the server cannot answer",
             "see the message, and docs/serving.md for the routes and their fields"),
    "E600": ("the processes disagree",
             "start them with the same files, versions and command"),
    "E601": ("another process of the run was lost",
             "start again, as torchrun --max-restarts does: it resumes"),
}
# fmt: on

# in a text: a command to type, what was meant, what there is; or lines of its own
SAYS_WHAT_TO_DO = re.compile(r"\bpython |\bpip install |did you mean |; runs (there|in it): |\n")
EXIT_CODES = {"E301": 3, "E201": 75, "E601": 75}  # every other UserError exits with 2


class UserError(Exception):
    """A mistake of the user's or the machine's, not ours.

    code: a key of ERRORS; text: where, what and how.
    """

    def __init__(self, code: str, text: str):
        assert code in ERRORS, code
        super().__init__(code, text)  # both, so that it survives pickling between processes
        self.code, self.text = code, text
        self.exit_code = EXIT_CODES.get(code, 2)

    def __str__(self) -> str:
        """The text, and below it what the table says, where the text does not say more."""
        line = f"{self.code}: {self.text}"
        if SAYS_WHAT_TO_DO.search(self.text):
            return line
        meaning, remedy = ERRORS[self.code]
        return f"{line}\n  {meaning}; {remedy.removeprefix('see the message; ')}"


def expand(path: str, where: str = "") -> str:
    """A path that a user wrote, with ~ and $NAME replaced.

    E002 for a $NAME that is not set, or there would soon be a folder called $NAME; the message
    begins with `where` it was written.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$\w+|\$\{\w+\}", expanded)
    if unset and not os.path.exists(expanded):  # $ may be part of a name
        place = f"{where}: " if where else ""
        raise UserError("E002", f"{place}{path}: {unset[0]} is not set")
    return expanded


def nearest(word: str, names) -> str | None:
    """The one of `names` that `word` is a misspelling or the beginning of; None: none is near."""
    if len(word.strip("-")) > 3:
        for name in names:
            if name.startswith(word):
                return name
    near = difflib.get_close_matches(word, list(names), 1, 0.79)  # at 0.75 steps is near to eps
    return near[0] if near else None


def no_path(text: str) -> str:
    """Why `text` can name no file, whether one is there or not (too long, a NUL in it); else ""."""
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


def raise_if(error: UserError | None) -> None:
    """What a rank has kept to itself until all could learn of it."""
    if error is not None:
        raise error


if __name__ == "__main__":
    print("| code | means | do |\n|---|---|---|")
    for code, (meaning, remedy) in ERRORS.items():
        print(f"| {code} | {meaning} | {remedy} |")
