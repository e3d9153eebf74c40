"""The commands that README.md, CONTRIBUTING.md and docs/*.md tell a reader to type: all lines of
their ```bash blocks, and what a test does with each."""

import re
import shlex
from functools import cache
from typing import NamedTuple

from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
# what other blocks may hold: nobody types it
OTHER_KINDS = {"", "json", "python", "text", "yaml"}
PROGRAMS = (
    "python|torchrun|pre-commit|sbatch|pip|apt-get|curl|ruff|echo|export|llama-server|llama/bin/pip"
)


class Command(NamedTuple):
    page: str  # README.md
    line: int  # where its block has it
    words: tuple[str, ...]  # as a shell hands them over, without what stands before the program
    env: tuple[str, ...] = ()  # NAME=value before it
    into: str = ""  # the file behind >>

    def __str__(self):
        return " ".join([*self.env, *self.words])


def blocks(text: str) -> list[tuple[str, int, str]]:
    """(kind, line of its first line, text) of each fenced block of a page."""
    found = []
    for block in FENCE.finditer(text):
        line = text.count("\n", 0, block.start()) + 2
        found.append((block[1], line, block[2]))
    return found


def commands_of(text: str, page: str = "", line: int = 1) -> list[Command]:
    """Lines that a backslash continues are one, comments are none, && stands between two."""
    found = []
    for written in text.replace("\\\n", "\a").splitlines():
        lexer = shlex.shlex(written.replace("\a", " "), posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                found.append(command_of(words, page, line))
                words = []
        line += 1 + written.count("\a")
    return found


def command_of(words: list[str], page: str, line: int) -> Command:
    words, env, into = list(words), [], ""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        env.append(words.pop(0))
    if ">>" in words:
        *words, _, into = words
    wrong = set(words) & {"|", ">", "<", ";", "&", "||"}
    assert not wrong, f"{page}:{line}: {wrong} are not understood here: {words}"
    return Command(page, line, tuple(words), tuple(env), into)


@cache
def all_blocks() -> list[list[Command]]:
    found = []
    for page in PAGES:
        for kind, line, text in blocks(page.read_text(encoding="utf-8")):
            if kind == "bash":
                found.append(commands_of(text, page.relative_to(ROOT).as_posix(), line))
    return found


OURS = re.compile(r"`((?:[A-Z_]+=\S+ )?python (?:\w+\.py|-m (?:lumen|tools|pytest))\b[^`]+)`")


def inline_commands() -> list[Command]:
    """`python ...` of ours, and of pytest, in sentences and tables, each once."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for kind, _, body in blocks(text):
            text = text.replace(f"```{kind}\n{body}", "")
        for typed in OURS.findall(" ".join(text.split())):
            plain = re.sub(r"[\[\]]|\.\.\.", "", typed)  # [--may be left out], and so on ...
            (command,) = commands_of(plain, page.name)
            found.setdefault(command.words, command)
    return list(found.values())


# ---------------------------------------------------------------- what is done with each


class Way(NamedTuple):
    """How a command is tried. RUN in CI, NIGHTLY by `pytest -m nightly` and checked in CI, CHECKED
    only: its program, its options and the files of ours it names are there. OUTSIDE: of other
    people's programs, files of ours that it names are there."""

    how: str
    why: str = ""
    more: str = ""  # words put behind it, which make it short


# what a command calls by another name than the test's, whose runs are 6 steps long
ALIASES = {"CONFIG": "configs/quickstart.yaml", "[NAMES]": "dense", "425": "3"}
ALIASES |= {"--nproc_per_node=auto": "--nproc_per_node=2"}  # however many cores there are
ALIASES |= {"out/eval/quickstart-425": "out/eval/quickstart-3"}
ALIASES |= {"out/eval/quickstart-850": "out/eval/quickstart-6"}

RUN, NIGHTLY, CHECKED, OUTSIDE = "run", "nightly", "checked", "outside"

STEPS = "--max_steps 6 --save_interval 3 --log_interval 3 --eval_tokens 1024"
SMALL = f"{STEPS} --batch_size 1 --model.n_layers 1 --compile_model false"
TUNED = "--max_steps 2 --eval_tokens 1024 --batch_size 2"
ASKED = "--limit 4"

# A command is tried as the first row says whose pattern it begins with. One that none names is RUN
# as it stands. A row that no command needs fails.
WAYS = {
    # ---- not ours, or not here
    r"(llama/bin/)?pip install|apt-get": Way(OUTSIDE, "needs the network"),
    r"python3? -m venv|\. |pre-commit": Way(OUTSIDE, "of the shell that the reader works in"),
    r"sbatch": Way(CHECKED, "no Slurm here: tests/processes/test_hosts.py has stand-ins"),
    r"llama-server": Way(OUTSIDE, "another program; the page says: never run"),
    r"python -m onnxruntime_genai": Way(OUTSIDE, "pip install onnxruntime-genai needs the network"),
    r"ruff|python -m pytest": Way(OUTSIDE, "what runs this test; .ci/run runs all but nightly"),
    r"export ": Way(OUTSIDE, "sets a variable of torch's"),
    r"LLAMA_PYTHON=": Way(CHECKED, "compiles llama.cpp; tests/unit/test_llama_cpp.py has it"),
    # ---- GPUs, or too large
    r"torchrun .*configs/": Way(CHECKED, "8 GPUs; of train_fsdp.py, does the layout fit 8"),
    r"torchrun .*--rdzv_endpoint": Way(CHECKED, "several hosts: test_hosts.py has two"),
    r"python -m tools.gpu --toy": Way(CHECKED, "tests/runs/test_gpu_tool.py runs it"),
    r"python -m tools.gpu": Way(CHECKED, "needs a GPU, or what it left"),
    r"python train.py configs/gpt2_124m": Way(
        NIGHTLY, "124 M parameters", f"{STEPS} --max_steps 1 --batch_size 1 --batch_tokens 1024"
    ),
    # ---- long
    r"python -m tools.bench faults": Way(CHECKED, ".ci/run has --quick, docs/faults.md the rest"),
    r"python -m tools.bench learn_chat": Way(CHECKED, "minutes a row: docs/measured.md has them"),
    r"python journey.py configs/journey_cpu.yaml$": Way(CHECKED, ".ci/run runs it"),
    r"python tools/golden.py": Way(CHECKED, "tests/runs/test_golden.py runs it"),
    r"torchrun .*train(_fsdp)?.py": Way(NIGHTLY, "processes of their own", SMALL),
    r"torchrun .*finetune.py": Way(NIGHTLY, "processes of their own", TUNED),
    r"torchrun .*evaluate.py": Way(NIGHTLY, "processes of their own", ASKED),
    # ---- run here, shorter
    r"python train.py --data_dir data/packages": Way(RUN, "", f"{SMALL} --batch_tokens 1024"),
    r"python train.py .*--print_config|python train.py --help": Way(RUN),
    r"python train_fsdp.py configs/scale/b300.*--dry_run": Way(NIGHTLY, "ten seconds"),
    r"python train(_fsdp)?.py .*--dry_run": Way(RUN),
    r"python train.py": Way(RUN, "", SMALL),
    r"python finetune.py merge": Way(RUN),
    r"python finetune.py": Way(RUN, "", TUNED),
    r"(LUMEN_API_KEY=\S+ )?python serve.py": Way(RUN, "", "--port 0"),
    r"python -m lumen.report .*--serve": Way(RUN, "", "--port 0"),
    r"python evaluate.py --compare": Way(RUN),
    r"python evaluate.py": Way(RUN, "", ASKED),
}


def way_of(command: Command) -> tuple[str, Way]:
    """(the row's pattern, what it says)."""
    for pattern, way in WAYS.items():
        if re.match(pattern, str(command)):
            return pattern, way
    return "", Way(RUN)
