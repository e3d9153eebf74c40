"""Every command of the documentation is tried, block by block, as a reader types it: it runs here
or at night, or its words are checked. tests/documented.py says which, and why."""

import argparse
import gzip
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import conftest
import httpx
import pytest
import torch
from conftest import ROOT
from documented import (
    ALIASES,
    CHECKED,
    NIGHTLY,
    OTHER_KINDS,
    PAGES,
    PROGRAMS,
    RUN,
    SMALL,
    TUNED,
    WAYS,
    all_blocks,
    blocks,
    commands_of,
    inline_commands,
    way_of,
)

import serve
import train
import train_fsdp
from lumen import follow, report
from lumen.commands import METHODS, parse_command
from lumen.control import Control
from train import Trainer

BLOCKS = all_blocks()
COMMANDS = [command for block in BLOCKS for command in block]
TRAINERS = ("train", "train_fsdp", "finetune")
LIMIT = 300  # seconds of a command that runs here: what a reader stops by hand has a row
LARGE = {".safetensors", ".npy", ".pt"}  # never written to where they are: links do for copies

# ---------------------------------------------------------------- a command as it is typed here


def words_of(command, more: str = "") -> list[str]:
    """Its words with what stands for something put in, and what makes it short behind."""
    return [*(ALIASES.get(word, word) for word in command.words), *more.split()]


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """(module of ours, its words), behind python, torchrun or sbatch."""
    launcher, *rest = words
    if launcher == "sbatch":
        assert (ROOT / rest[0]).is_file()
        rest = rest[1:]
    while launcher == "torchrun" and rest[0].startswith("--"):
        rest = rest[1:]
    if rest[0] == "-m":
        assert (ROOT / (rest[1].replace(".", "/") + ".py")).is_file(), f"there is no {rest[1]}"
        return rest[1], rest[2:]
    assert (ROOT / rest[0]).is_file(), f"there is no {rest[0]}"
    return rest[0].removesuffix(".py").replace("/", "."), rest[1:]


def run(module: str, words: list[str], patch) -> None:
    """`python -m module words`, in this process; it must end well."""
    main = importlib.import_module(module).main
    patch.setattr(sys, "argv", [module, *words])
    try:
        code = main(words) if inspect.signature(main).parameters else main()
    except SystemExit as end:  # --help
        code = end.code
    assert not code, f"exit code {code}"


class Parsed(Exception):
    """The words have been read, and are right."""


def check(module: str, words: list[str]) -> None:
    """Its words are options of that program, with values that they may have. UserError."""
    with pytest.MonkeyPatch.context() as patch:
        if module in TRAINERS and words[:1] != ["merge"]:
            run(module, [*words, "--print_config"], patch)
            return
        for name in ("parse_args", "parse_intermixed_args"):
            parse = getattr(argparse.ArgumentParser, name)
            patch.setattr(argparse.ArgumentParser, name, parse_only(parse))
        with pytest.raises(Parsed):
            run(module, words, patch)


def parse_only(parse):
    def parse_and_stop(self, *args, **options):
        parse(self, *args, **options)
        raise Parsed

    return parse_and_stop


def check_launch(words: list[str]) -> None:
    """torchrun's own options, and that the layout fits so many ranks; what the environment of a job
    says stands for itself."""
    from torch.distributed.run import get_args_parser

    job = {"SLURM_NODEID": "0", "SLURM_JOB_ID": "7", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    typed = re.sub(r"\$(\w+)", lambda match: job[match[1]], " ".join(words[1:]))
    given = get_args_parser().parse_args(typed.split())
    module, rest = program_of(words)
    if module == "train_fsdp" and given.nproc_per_node.isdigit():
        cfg = train.read_config(rest)[0]
        hosts = given.nnodes.partition(":")[0]
        train_fsdp.layout_of(cfg, int(given.nproc_per_node) * int(hosts))


def check_files(words: list[str]) -> None:
    """Files of ours that another program is to read."""
    for word in words:
        if re.fullmatch(r"(requirements|tests|slurm|configs)[\w./-]*", word):
            assert (ROOT / word).exists(), word


def look(command) -> None:
    """What can be said of a command that does not run now."""
    words = words_of(command)
    check_files(words)
    if way_of(command)[1].how in (NIGHTLY, CHECKED):
        check(*program_of(words))
        if words[0] == "torchrun":
            check_launch(words)


# ---------------------------------------------------------------- where they run


def write(file: str, rows) -> None:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def block_of(page: str, kind: str, holding: str) -> str:
    """A block of a page: what it shows is what is tried."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (found,) = [body for k, _, body in blocks(text) if k == kind and holding in body]
    return found


def make_texts() -> None:
    """What a reader would bring, of the repository's own words."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    for i, text in enumerate(texts[:10]):
        write(f"my_texts/{i}.md", [text])
    paragraphs = [part for text in texts[10:] for part in text.split("\n\n")]
    write("more.jsonl", [{"text": part} for part in paragraphs])
    for i, name in enumerate(("book.txt", "release.txt", "today.txt")):
        write(name, paragraphs[4 * i : 4 * i + 4])
    Path("logs/2026").mkdir(parents=True)
    with gzip.open("logs/2026/day.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(Path("more.jsonl").read_text(encoding="utf-8"))
    Path("data.yaml").write_text(block_of("docs/data.md", "yaml", "out: data/mix"))
    shutil.copytree("logs/2026", "crawl")
    shutil.copytree("my_texts", "src")


def make_conversations() -> None:
    asked = [(f"What is {n}?", f"{n} is a number.") for n in range(40)]
    write("replies.jsonl", [{"prompt": q, "response": a} for q, a in asked])
    write("pairs.jsonl", [{"prompt": q, "chosen": a, "rejected": "No."} for q, a in asked])
    roles = [
        ({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in asked
    ]
    write("chats.jsonl", [{"messages": messages} for messages in roles])
    write("my_lumina.yaml", ["training_params: {num_epochs: 1}", "data_dir: data/mine"])
    write("chat.yaml", ["init_from: out/base", "prepare: {sources: [chats.jsonl]}"])


def make_questions() -> None:
    """Rows of one's own as docs/evaluation.md shows them, and files of public tasks."""
    from test_benchmarks import BOOLQ, CORE_ROWS, HELLASWAG

    shown = block_of("docs/evaluation.md", "json", "choices").splitlines()
    write("my.jsonl", shown[:1] * 4)
    for name, rows in {"boolq": BOOLQ, "hellaswag": HELLASWAG}.items():
        write(f"benchmarks/{name}.jsonl", rows * 3)
    task = {"label": "cloze", "dataset_uri": "x/cloze.jsonl", "num_fewshot": [2]}
    write("eval_bundle/core.yaml", [{"icl_tasks": [task | {"icl_task_type": "language_modeling"}]}])
    write("eval_bundle/eval_data/x/cloze.jsonl", CORE_ROWS["language_modeling"])
    write(
        "eval_bundle/eval_meta_data.csv", ["Eval Task,Task Category,Random baseline", "cloze,a,0"]
    )
    keys = {"task": "my_task", "dataset_path": "json", "output_type": "multiple_choice"}
    keys |= {"dataset_kwargs": {"data_files": {"test": str(Path("my.jsonl").resolve())}}}
    keys |= {"test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    keys |= {"doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}]}
    write("tasks/my_task.yaml", [keys])


LIBRARY = "bz2 enum pkgutil plistlib timeit warnings calendar cmd copy csv difflib fractions heapq"
LIBRARY += " pprint random shutil statistics textwrap"


def use_small_library(folder: Path, patch) -> None:
    """What the sources stdlib, packages and docstrings find: some modules of Python's library."""
    folder.mkdir()
    for name in LIBRARY.split():
        shutil.copy(importlib.util.find_spec(name).origin, folder)
    found = {"get_path": lambda name: str(folder), "get_paths": lambda: {"stdlib": str(folder)}}
    patch.setattr("lumen.sources.sysconfig", SimpleNamespace(**found))
    patch.setattr("lumen.docstrings.sysconfig", SimpleNamespace(**found))
    patch.setattr("lumen.docstrings.from_c", list)
    importlib.import_module("lumen.docstrings").entries.cache_clear()


def make_runs(patch) -> None:
    """By the same commands, short."""

    def do(text: str) -> None:
        run(*program_of(list(commands_of(text)[0].words)), patch)

    do(f"python train.py configs/quickstart.yaml {SMALL}")
    do(f"python finetune.py out/quickstart --data docstrings {TUNED}")
    for name in ("run", "base", "newer"):
        shutil.copytree("out/quickstart", f"out/{name}")
    shutil.copytree("out/quickstart-sft", "out/chat")
    do("python prepare_data.py my_texts/ --out data/mine --tokenizer bpe:2048")
    do("python export.py to_hf out/quickstart hf_model")
    for name in ("A", "B"):
        shutil.copytree("out/quickstart", f"out/{name}")
        do(f"python evaluate.py out/{name} --tasks my.jsonl --limit 4")
    # a run that somebody steered: mode replay repeats its decisions
    trainer = Trainer(["configs/quickstart.yaml", "--out_dir", "out/x", *SMALL.split()])
    for step in trainer.iterations():
        if step == 2:
            assert trainer.adjust_weight_decay(0.05)["executed"]
    trainer.end()
    shutil.copytree("out/x", "out/y")
    from test_export import save_lunaris

    save_lunaris("latest_checkpoint.pt", "main")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the commands name."""
    top = tmp_path_factory.mktemp("place")
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests" / "unit")  # rows and files that tests there have
        patch.chdir(top)
        use_small_library(top / "library", patch)
        for name in ("configs", "slurm"):
            Path(name).symlink_to(ROOT / name)
        make_texts()
        make_conversations()
        make_questions()
        make_runs(patch)
        yield top
    importlib.import_module("lumen.docstrings").entries.cache_clear()
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of that folder, which is the home of whoever types."""

    def copy(source, target):
        (os.link if Path(source).suffix in LARGE else shutil.copy2)(source, target)

    top = tmp_path / "here"
    shutil.copytree(place, top, symlinks=True, copy_function=copy)
    monkeypatch.chdir(top)
    monkeypatch.setenv("HOME", str(top))
    monkeypatch.setattr(
        sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"Hi"))
    )
    return top


def option(words: list[str], name: str, default=None) -> str | None:
    return words[words.index(name) + 1] if name in words else default


def made_by(module: str, words: list[str]) -> str | None:
    """The folder or file that the command is to make."""
    if {"--help", "--dry_run", "--print_config"} & set(words):
        return None
    if module == "export" or words[:1] == ["merge"]:
        return words[2]
    if module == "finetune":
        base, method = Path(words[0]), option(words, "--method", "sft")
        name = base.stem if base.suffix == ".yaml" else f"{base.name}-{method}"
        return option(words, "--out_dir", f"out/{name}")
    if module in TRAINERS:
        return train.read_config(words)[0].out_dir
    return option(words, "--out")


class Reader:
    """Who types the commands of a block one after the other, in one folder."""

    def __init__(self, patch):
        self.patch = patch
        self.server = None  # the last one that was started: its shift, its thread

    def begin(self, commands) -> None:
        """What the block makes is not there before, or is of another block."""
        ours = [program_of(words_of(c)) for c in commands if c.words[0] in ("python", "torchrun")]
        for target in [made_by(*program) for program in ours]:
            if target and Path(target).exists():
                shutil.rmtree(target)

    def type(self, command) -> None:
        words = words_of(command, way_of(command)[1].more)
        if words[0] == "echo":
            self.steer(words, command.into)
        elif words[0] == "curl":
            self.ask(words)
        else:
            assert words[0] == "python", "how is that to be tried? see tests/documented.py"
            self.start(*program_of(words), command.env)

    def start(self, module: str, words: list[str], env) -> None:
        for setting in env:
            name, _, value = setting.partition("=")
            self.patch.setenv(name, value)
        if module == "serve":
            self.serve(words)
            return
        if "--serve" in words:
            self.follow(words)
            return
        run(module, words, self.patch)
        target = made_by(module, words)
        assert target is None or Path(target).exists(), target

    def steer(self, words: list[str], file: str) -> None:
        """A line for control.jsonl names a method and its arguments; a run would take it."""
        row = parse_command(" ".join(words[1:]))
        assert row["method"] in METHODS and Path(file).parent.is_dir()
        args = row.get("args", [])
        listed, named = ([], args) if isinstance(args, dict) else (args, {})
        if row["method"] not in ("save", "stop"):
            inspect.signature(getattr(Control, row["method"])).bind(None, *listed, **named)

    def serve(self, words: list[str]) -> None:
        """Until it can be reached; it goes on in a thread."""
        self.end()
        shifts, ready = [], threading.Event()

        class Kept(serve.Shift):
            def begin(self, server):
                super().begin(server)
                shifts.append(self)
                ready.set()

        self.patch.setattr(serve, "Shift", Kept)
        thread = threading.Thread(target=serve.main, args=(words,), daemon=True)
        thread.start()
        assert ready.wait(60), "the server does not begin"
        self.server = shifts[0], thread
        assert httpx.get(f"{shifts[0].where}/health", timeout=30).json() == {"status": "ok"}

    def follow(self, words: list[str]) -> None:
        """The page that follows runs, until it can be read."""
        servers, ready = [], threading.Event()

        class Kept(follow.Server):
            def serve_forever(self):
                servers.append(self)
                ready.set()
                super().serve_forever()

        self.patch.setattr(follow, "Server", Kept)
        thread = threading.Thread(target=report.main, args=(words,), daemon=True)
        thread.start()
        assert ready.wait(60), "the server does not begin"
        host, port = servers[0].socket.getsockname()
        try:
            page = httpx.get(f"http://{host}:{port}/", timeout=30)
            assert page.status_code == 200 and "<html" in page.text
        finally:
            servers[0].shutdown()
            thread.join(30)
        assert not thread.is_alive()

    def ask(self, words: list[str]) -> None:
        """What curl would send, to the server that this block has started: on a free port."""
        parser = argparse.ArgumentParser()
        for option in ("url", "-H", "-d"):
            parser.add_argument(option)
        asked = parser.parse_args(words[1:])
        name, _, value = asked.H.partition(": ")
        url = asked.url.replace("http://127.0.0.1:8000", self.server[0].where)
        answer = httpx.post(url, content=asked.d, headers={name: value}, timeout=60)
        assert answer.status_code == 200 and "message" in answer.json()["choices"][0]

    def end(self) -> None:
        if self.server:
            shift, thread = self.server
            shift.loop.call_soon_threadsafe(shift.stop)
            thread.join(30)
            assert not thread.is_alive()
        self.server = None


# ---------------------------------------------------------------- the tests


def named(block) -> str:
    return f"{block[0].page}:{block[0].line}"


@pytest.mark.parametrize("block", BLOCKS, ids=named)
def test_a_block_does_what_it_says(block, here, monkeypatch):
    """Its commands one after the other; of those that do not run here, what can be checked."""
    reader = Reader(monkeypatch)
    reader.begin([command for command in block if way_of(command)[1].how == RUN])
    try:
        for command in block:
            try_out(command, reader)
    finally:
        reader.end()


def too_long(number, frame):
    raise TimeoutError(f"it does not end within {LIMIT} seconds: see tests/documented.py")


def try_out(command, reader) -> None:
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    try:
        if way_of(command)[1].how == RUN:
            reader.type(command)
        else:
            look(command)
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{command.page}:{command.line}: {command}: {error}") from error
    finally:
        signal.alarm(0)


LONG = {c.words: c for c in COMMANDS if way_of(c)[1].how == NIGHTLY}


@pytest.mark.nightly
@pytest.mark.parametrize("command", LONG.values(), ids=str)
def test_a_long_command_runs(command, here, monkeypatch):
    reader = Reader(monkeypatch)
    reader.begin([command])
    if command.words[0] == "python":
        reader.type(command)
        return
    words = words_of(command, way_of(command)[1].more)
    if "--standalone" not in words:
        words.insert(1, "--standalone")  # else two tests at once would want the same port
    shutil.rmtree("data/stdlib")  # of the small library, which another process does not see
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    words[script] = str(ROOT / words[script])
    words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    found = conftest.run(words, 600, cwd=here, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("page", ["api.md", "api-model.md"])
def test_the_example_of_a_page_runs(page, here):
    shutil.rmtree("out")
    exec(compile(block_of(f"docs/{page}", "python", "import"), page, "exec"), {})


def test_every_row_of_the_table_is_needed():
    used = {way_of(command)[0] for command in COMMANDS}
    assert set(WAYS) <= used, f"no command needs {sorted(set(WAYS) - used)}"
    assert all(way.why for way in WAYS.values() if way.how != RUN)
    assert len(COMMANDS) > 100, "the pattern finds no blocks any more"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_reader_types_is_bash(page):
    text = page.read_text(encoding="utf-8")
    for kind, line, body in blocks(text):
        assert kind in {"bash", *OTHER_KINDS}, f"{page.name}:{line}: a block of {kind}"
        typed = re.findall(rf"^(?:{PROGRAMS})\b.*", body, re.MULTILINE)
        assert kind == "bash" or not typed, f"{page.name}:{line}: these are commands: {typed}"
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(blocks(text)), page.name


@pytest.mark.parametrize("command", inline_commands(), ids=str)
def test_a_command_in_a_sentence_has_words_that_are_known(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    if command.words[:3] == ("python", "-m", "pytest"):
        check_files(command.words)
        name = option(list(command.words), "-k", "test_commands")
        assert list((ROOT / "tests").glob(f"*/{name}.py")), f"no file of tests is called {name}"
        return
    module, words = program_of(words_of(command))
    if any(word.startswith("--") for word in words):  # else it names a program, no command of it
        check(module, words)


def test_the_run_that_the_readme_speaks_of_has_those_steps():
    cfg = train.read_config(["quickstart"])[0]
    assert (cfg.save_interval, cfg.max_steps) == (425, 850), "steps that README.md evaluates"


@pytest.mark.parametrize(
    "text",
    [
        "python sample.py out/run --promt x",
        "python nothing.py",
        "python train.py CONFIG --print_config --model.n_layer_s 2",
        "python evaluate.py out/nothing",
        "make",
        "pip install -r requirements-nothing.txt",
        "python -m tools.gpu --tiny A",
        "torchrun --nproc_per_node=3 train_fsdp.py configs/scale/b1.yaml --expert_parallel 4",
        "torchrun --nproc_per_knode=8 train.py configs/gpt2_124m.yaml",
    ],
)
def test_a_command_that_does_not_work_is_found(text, here, monkeypatch):
    with pytest.raises(AssertionError):
        try_out(commands_of(text, "page")[0], Reader(monkeypatch))


EXAMPLE = """
pip install x && A=1 python a.py --b 'c d'   # a word
torchrun --n=2 \\
  b.py "e"
echo '{"f": [1]}' >> g/h
"""


def test_blocks_are_read_as_a_shell_reads_them():
    found = commands_of(EXAMPLE, "p", 1)
    assert [c.words for c in found] == [
        ("pip", "install", "x"),
        ("python", "a.py", "--b", "c d"),
        ("torchrun", "--n=2", "b.py", "e"),
        ("echo", '{"f": [1]}'),
    ]
    assert [(c.line, c.env, c.into) for c in found[1:]] == [
        (2, ("A=1",), ""),
        (3, (), ""),
        (5, (), "g/h"),
    ]
