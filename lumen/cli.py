"""`train.py CONFIG --key value`: the YAML file or preset and the words typed over it -> `Config`.

What is typed beats what the file says, also where the file says it in another way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lumen import aliases, checkpoint, modes, nearby, prepare_key
from lumen.config import (
    BLOCKS,
    FLAGS,
    SIMULATED,
    Config,
    build_config,
    check_written,
    open_blocks,
    own_keys,
    refuse_unknown,
)
from lumen.errors import UserError, expand, nearest
from lumen.values import convert, short, without_comments

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
JOURNEYS = ("journey_cpu", "speedrun_8xh100")  # of journey.py
TYPED = "command line"  # where a key stands that is in no file
PIPES: dict[str, str] = {}  # what can be read only once: main() and the Trainer both ask for it
# Typed, a key replaces these of the file, which say the same in another way.
INSTEAD = {
    "max_steps": ("num_epochs", "tokens_per_parameter"),
    "num_epochs": ("max_steps", "tokens_per_parameter"),
    "tokens_per_parameter": ("max_steps", "num_epochs"),
    "batch_tokens": ("gradient_accumulation_steps",),
    "gradient_accumulation_steps": ("batch_tokens",),  # batch_size alone goes with batch_tokens
    "data_dir": ("data", "prepare", *modes.PATHS),
    "data": ("data_dir", "prepare", *modes.PATHS),
    "prepare": ("data_dir", "data", *modes.PATHS),
    "training_mode": ("data_dir", "data", "prepare"),
    "base_paths": ("data_dir", "data", "prepare"),
    "finetuning_paths": ("data_dir", "data", "prepare"),
    "model.ffn_hidden_multiplier": ("model.d_ff",),
    "model.moe_layers": ("model.moe_every", "model.n_dense_layers"),
    "model.moe_every": ("model.moe_layers",),
    "model.mod_layers": ("model.mod_every", "model.mod_start_layer", "model.mod_end_layer"),
    "model.mod_every": ("model.mod_layers",),
}
OTHER_DATA = {"data_dir", "data", *modes.PATHS}


# ---------------------------------------------------------------- YAML


class Plain(yaml.SafeLoader):
    """YAML whose numbers and dates stay as written where they would become something else.

    010 is no 8, 1:30 no 90, and a folder called 0.10 or 2026-01-02 keeps its name. convert() makes
    numbers where they belong.
    """

    def construct_number(self, node):
        text = node.value
        if re.fullmatch(r"[-+]?(0|[1-9]\d*)", text) and len(text) < 20:
            return int(text)
        try:
            return float(text) if repr(float(text)) == text else text
        except ValueError:
            return text


for kind in ("int", "float", "timestamp"):
    Plain.add_constructor(f"tag:yaml.org,2002:{kind}", Plain.construct_number)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with its mark. E001, E002."""
    if str(path) in PIPES:
        return PIPES[str(path)]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError("E001", f"{path} cannot be read: {error.strerror}") from error
    marked = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        what = f"byte 0x{data[error.start]:02x} is not {error.encoding.upper()}"
        text = f"{path}:{line}: {what}; convert the file, for instance with iconv"
        raise UserError("E002", text) from error
    if not path.is_file():
        PIPES[str(path)] = text
    return text


def key_lines(node, path: Path) -> dict[str, int]:
    """The line of each key of a YAML document: {"model.d_model": 7}. E002 where one comes twice."""
    lines: dict[str, int] = {}
    seen = set()  # nodes: an anchor may be met twice, or in itself

    def walk(node, prefix: str) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                lines[f"{prefix}[{i}]"] = item.start_mark.line + 1
                walk(item, f"{prefix}[{i}]")
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line = key.start_mark.line + 1
                name = f"{prefix}.{key.value}" if prefix else str(key.value)
                merge = key.tag == "tag:yaml.org,2002:merge"  # <<: *other
                if merge:
                    name = prefix
                elif name in lines:
                    text = f"{path}:{line}: {name} stands here for the second time"
                    raise UserError("E002", text)
                lines[name] = line
                walk(value, name)

    walk(node, "")
    return lines


def load_yaml(path: Path) -> tuple[dict, dict[str, int]]:
    """A YAML or JSON file as a dict, and the line of each key. Keys given twice are refused."""
    text = read_text(path)
    if path.suffix == ".json":
        text = without_comments(text)
    tree, lines = {}, {}
    try:
        loader = Plain(text)
        node = loader.get_single_node()
        if node is not None:
            lines = key_lines(node, path)
            tree = loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError("E002", f"{path}{line}: not valid YAML: {error}") from error
    except RecursionError as error:
        text = f"{path}: not a configuration: nested too deeply, or in itself"
        raise UserError("E002", text) from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        text = f"{path}: a mapping of keys is expected, this is a {type(tree).__name__}"
        hint = "; in YAML a line is key: value" if path.suffix == ".py" else ""
        raise UserError("E002", f"{text}{hint}")
    return tree, lines


def typed_value(text: str):
    """A word of the command line as YAML reads it, "" as null; what is no YAML is a text."""
    with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
        return yaml.load(text, Plain) if text else None  # Plain is a SafeLoader
    return text


# ---------------------------------------------------------------- file and command line


CONFIG = "CONFIG"  # train.py's first word, which has no name


@dataclass
class CommandLine:
    """The words behind `train.py`: CONFIG, keys over it, flags. Or keys of a file over a preset."""

    config: str | None = None
    tree: dict = field(default_factory=dict)  # keys as typed, in the blocks of a YAML
    typed: set[str] = field(default_factory=set)  # their names, "model.d_model"
    flags: dict = field(default_factory=dict)  # FLAGS and SIMULATED
    notes: list[str] = field(default_factory=list)  # names of others that are no keys
    where: Callable[[str], str] = lambda key: TYPED  # its place

    def take(self, theirs: str, value: str | None) -> None:
        """An option and its value, None where nothing stands behind it. E002."""
        key = aliases.table("train.py").get(theirs, {}).get("to", theirs)
        if key != theirs:
            self.notes.append(f"{theirs} -> {key} {value or ''}".rstrip())
        if key == CONFIG:
            if self.config is not None:
                text = f"--{theirs} {value}: {self.config} is the file or preset; drop one"
                raise UserError("E002", f"{TYPED}: {text}")
            self.config = value
        elif key in FLAGS:
            self.flags[key] = value is None or convert(value, bool, f"{TYPED}: --{theirs}")
        elif key in SIMULATED:
            self.flags[key] = simulated(key, value)
        else:
            target, name = slot(self.tree, key)
            target[name] = typed_value(value)
            self.typed.add(key)
            open_blocks(self.tree, self.where)


def read_words(argv: list[str]) -> CommandLine:
    """Words -> CommandLine; --key value, --key=value, hyphens or underscores. E002."""
    words, line = list(argv), CommandLine()
    if words and not words[0].startswith("-"):
        line.config = words.pop(0)
    open_blocks(line.tree, line.where)
    while words:
        line.take(*take_option(words))
    asked = [key for key in line.flags if key in SIMULATED]
    if asked and not line.flags.get("dry_run"):
        text = "goes with --dry_run only; torchrun sets the real number"
        raise UserError("E002", f"{TYPED}: --{asked[0]} {text}")
    return line


def take_option(words: list[str]) -> tuple[str, str | None]:
    """Takes the first option, and its value, from `words`. E002."""
    word = words.pop(0)
    if word == "-h":
        word = "--help"
    if not word.startswith("--"):
        text = "options look like --key value or --key=value"
        raise UserError("E002", f"{TYPED}: {short(word)}: {text}")
    name, has_value, value = word[2:].partition("=")
    name = name.replace("-", "_")
    if has_value:
        return name, value
    if aliases.table("train.py").get(name, {}).get("to", name) in FLAGS:
        return name, None
    values = []
    while words and not words[0].startswith("--") and (not values or goes_nowhere(name)):
        values.append(words.pop(0))
    if not values and not may_stand_alone(name):
        raise UserError("E002", f"{TYPED}: --{name} needs a value")
    return name, " ".join(values) if values else "true"


def goes_nowhere(name: str) -> bool:
    """Whether it is refused or ignored anyway: of these, several values are no other mistake."""
    row = aliases.table().get(name, {})
    return name not in own_keys() and "to" not in row and bool(row.keys() & {"refuse", "ignore"})


def may_stand_alone(key: str) -> bool:
    """Whether --key without a value means true; unknown keys are refused later."""
    if key in SIMULATED or key in aliases.table("train.py"):
        return False
    own = own_keys()
    row = aliases.table().get(key, {})
    if key not in own and True in row.get("values", {}):
        return True
    kind = own.get(key) or own.get(row.get("to"), bool)
    return bool in (kind, *typing.get_args(kind))


def simulated(key: str, value: str):
    """The value of an option of --dry_run. E002."""
    found = convert(value, SIMULATED[key][0], f"{TYPED}: --{key}")
    if not isinstance(found, str) and found <= 0:
        raise UserError("E002", f"{TYPED}: --{key}: {value} must be above 0")
    return found


def slot(tree: dict, key: str) -> tuple[dict, str]:
    """The mapping in which a key stands, and its name there."""
    block, _, name = key.partition(".")
    if name and block == "prepare" and not isinstance(tree.get(block), dict):
        tree[block] = {}
    return (tree[block], name) if name and block in (*BLOCKS, "prepare") else (tree, key)


class Places:
    """Where each key stands: file and line, or the command line."""

    def __init__(self, path: Path | None, lines: dict[str, int], otherwise: str = TYPED):
        self.known = {key: f"{path}:{line}" for key, line in lines.items()}
        self.otherwise = str(path or otherwise)
        self.names: dict[str, str] = {}  # our key: the name it was written under

    def __call__(self, key: str) -> str:
        """Its place, or that of the innermost mapping around it that was written."""
        while key and key not in self.known:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self.known.get(key, self.otherwise)

    def type_over(self, key: str, name: str, where) -> None:
        """It stands at where(name) now, with all that stands inside it."""
        inner = (f"{key}.", f"{key}[")
        self.known = {k: place for k, place in self.known.items() if not k.startswith(inner)}
        self.known[key] = where(name)
        theirs = getattr(where, "known", {})
        self.known |= {k: place for k, place in theirs.items() if k.startswith(inner)}


def read_any(config) -> tuple[Config, dict, list[str]]:
    """What a Trainer may be given -> the configuration, the keys as written, notes for the user."""
    if isinstance(config, dict):
        notes: list[str] = []
        written = json.loads(json.dumps(config, default=str))  # a copy, of plain values
        place = Places(None, {}, "config")
        open_blocks(written, place)
        written, wrong = over_preset(written, place, notes)
        cfg = build_config(written, place, notes, wrong)
        return dataclasses.replace(cfg, out_dir=cfg.out_dir or "out/run"), written, notes
    if not isinstance(config, tuple):
        config = read_config(config if isinstance(config, list) else [str(config)])
    cfg, written, notes, _ = config
    return cfg, written, notes


def read_config(argv: list[str], complete=None) -> tuple[Config, dict, list[str], dict]:
    """YAML file and command line -> (Config, keys as written, notes for the user, flags).

    complete(tree, place, notes) may add keys, under our names, before they are checked.
    """
    line = read_words(argv)
    notes = line.notes
    path = config_file(line, notes)
    tree, lines = load_yaml(path) if path else ({}, {})
    home = run_of(path) if path else None
    moved_from = str(tree.get("out_dir")) if home else None
    if home and not same_place(expand(moved_from), home):
        tree["out_dir"] = home
    else:
        moved_from = None
    place = Places(path, lines)
    open_blocks(tree, place)
    tree, wrong = over_preset(tree, place, notes)
    wrong += type_over(tree, line, place, notes, is_preset(path))
    if complete:
        check_written(tree, place, wrong)  # first: the base may not be there yet
        complete(tree, place, notes)
    data_keys = ("data_dir", "data", "prepare", *modes.PATHS)
    if path is None and not any(tree.get(key) for key in data_keys):
        refuse_unknown(tree, place, wrong)  # what was typed is answered first
        usage = "python train.py CONFIG [--key value ...]; CONFIG is your YAML file or a preset"
        raise UserError("E001", f"which configuration? {usage}: {', '.join(presets())}")
    cfg = build_config(tree, place, notes, wrong)
    if moved_from and tree.get("out_dir") == home:
        text = f"where this config.yaml lies; it says {moved_from}: the run was moved or copied"
        notes.append(f"out_dir: {home}, {text}")
    elif home and cfg.out_dir and not same_place(cfg.out_dir, home):
        notes.append(f"out_dir: {cfg.out_dir}, as typed; {path} is of the run in {home}")
    if cfg.out_dir is None:
        name = path.stem if path and path.is_file() else "run"
        cfg = dataclasses.replace(cfg, out_dir=f"out/{name}")
    return cfg, tree, notes, line.flags


def config_file(line: CommandLine, notes: list[str]) -> Path | None:
    """That of CONFIG, or of the run that is gone on with. E001, E304."""
    if line.config is None:
        return config_of_run(line, notes)
    path = find_yaml(line.config)
    if is_preset(path) and path.stem in JOURNEYS:
        raise UserError("E001", f"{line.config} is a journey: python journey.py {path.stem}")
    return path


def config_of_run(line: CommandLine, notes: list[str]) -> Path | None:
    """`train.py --resume RUN_OR_STEP` without CONFIG: the config.yaml of that run. E304: there is
    no run."""
    names = [key for key, row in aliases.table().items() if row.get("to") == "resume"]
    asked = [line.tree[key] for key in ("resume", *names) if isinstance(line.tree.get(key), str)]
    if not asked or asked[0] in ("auto", "none"):
        return None
    folder = Path(expand(asked[0]))
    for home in (folder, folder.parent):
        if folder.is_dir() and (home / "config.yaml").is_file():
            notes.append(f"resume {asked[0]} -> {CONFIG} {home / 'config.yaml'}")
            return home / "config.yaml"
    checkpoint.folders(folder)
    raise UserError("E304", f"{folder} lies in no run with a config.yaml: python train.py CONFIG")


def over_preset(tree: dict, place: Places, notes: list[str]) -> tuple[dict, list[str]]:
    """A file's keys over those of its `config_choice`, as if they were typed -> (keys, what is
    refused). E001: no such preset."""
    choice = tree.pop("config_choice", None)
    if choice is None:
        return tree, []
    try:
        path = find_yaml(str(choice))
    except UserError as error:
        text = f"{place('config_choice')}: config_choice: {error.text}"
        raise UserError(error.code, text) from error
    preset, lines = load_yaml(path)
    of_preset, of_file = Places(path, lines), Places(None, {}, place.otherwise)
    of_file.known = dict(place.known)
    place.known = of_preset.known
    open_blocks(preset, of_preset)
    typed = set(aliases.written(tree, own_keys()))
    line = CommandLine(str(choice), tree, typed, where=of_file)
    notes.append(f"config_choice {choice} -> {CONFIG} {path}")
    return preset, type_over(preset, line, place, notes, is_preset(path))


def type_over(tree: dict, line: CommandLine, place: Places, notes, of_preset: bool) -> list[str]:
    """Put what was typed over the file's keys, both under our names first -> what is refused."""
    own = own_keys()
    of_file = aliases.rename(tree, own, place)
    place.known |= {key: place(name) for key, name in of_file.moved.items()}
    of_words = aliases.rename(line.tree, own, line.where, tree)
    place.names |= of_file.moved | of_words.moved
    line.typed = (line.typed - set(of_words.moved.values())) | set(of_words.moved)
    if any(key.startswith("prepare.") for key in line.typed):
        join_prepare(tree, line, of_preset)
    notes += of_file.notes + of_words.notes
    for block in BLOCKS:
        if block in line.typed:  # a whole block was typed: it replaces the file's
            tree[block] = {}
        tree[block] |= line.tree.pop(block)
    tree |= line.tree
    for key in line.typed:
        place.type_over(key, of_words.moved.get(key, key), line.where)
    if of_preset:
        leave_out_prompt(tree, line.typed, place, notes)
    typed_wins(tree, line.typed, place, notes)
    return of_file.wrong + of_words.wrong


def join_prepare(tree: dict, line: CommandLine, of_preset: bool) -> None:
    """Typed options of `prepare` join the file's. Where what is trained on was typed too, the
    file's sources go, and a preset's options with them: they are of its own text."""
    of_file, typed = tree.get("prepare"), line.tree["prepare"]
    if not isinstance(of_file, dict):
        of_file = {}
    if "prepare" in line.typed or not isinstance(typed, dict):
        return  # all of it was typed
    if typed.get("sources") and not of_preset:
        of_file = {key: v for key, v in of_file.items() if key not in prepare_key.PLACES}
    elif of_file.get("sources") and (typed.get("sources") or line.typed & OTHER_DATA):
        of_file = small_tokenizer(tree, of_file)
    if typed.get("sources") or line.typed & OTHER_DATA:
        line.typed.add("prepare")
    line.tree["prepare"] = prepare_key.join(of_file, typed)


def small_tokenizer(tree: dict, prepare: dict) -> dict:
    """What stays of a preset's `prepare` for other text: a model too small for the default
    tokenizer, bpe:8192, keeps its own."""
    small = 0 < (tree["model"].get("vocab_size") or 0) < 8192
    return {key: v for key, v in prepare.items() if small and key == "tokenizer"}


def leave_out_prompt(tree: dict, typed: set[str], place: Places, notes: list[str]) -> None:
    """A preset's sample_prompt continues its own text; with other data a text is begun."""
    own = next((key for key in ("data_dir", "data", *modes.PATHS, "prepare") if key in typed), None)
    if own and "sample_prompt" in tree and "sample_prompt" not in typed:
        tree["sample_prompt"] = ""
        text = "the preset's sample_prompt goes with its own data, not with"
        notes.append(f"{text} --{as_typed(own, place)}: the sample begins a new text")


def as_typed(key: str, place: Places) -> str:
    """What the user wrote that became this key: train_data is `prepare` here."""
    return place.names.get("prepare.sources", key) if key == "prepare" else key


def typed_wins(tree: dict, typed: set[str], place: Places, notes: list[str]) -> None:
    """What is typed beats what the file says in another way, with a note."""
    for key in [key for key in INSTEAD if key in typed]:
        ours = aliases.get(tree, key)
        if ours is None or ours is False:
            continue
        for other in INSTEAD[key]:
            theirs = aliases.get(tree, other)
            if theirs is None or theirs is False or other in typed:
                continue
            if other == "prepare" and isinstance(theirs, dict):
                if theirs.get("out") == ours or not theirs.get("sources"):
                    continue  # data_dir is what the file prepares, or is held against its options
            aliases.drop(tree, other)
            if other == "prepare" and modes.names_text(tree):
                tree["prepare"] = small_tokenizer(tree, theirs) or None
            name = as_typed(key, place)
            notes.append(f"{name} was typed: {other}: {short(theirs)} of the file is left out")


def is_preset(path: Path | None) -> bool:
    return path is not None and CONFIGS in path.resolve().parents


def presets() -> dict[str, Path]:
    """Name -> file of every preset."""
    files = sorted(CONFIGS.rglob("*.yaml"))
    # tables that are no configurations, and journeys
    others = ("aliases", "smoke", *JOURNEYS)
    return {path.stem: path for path in files if path.stem not in others}


def find_journey(name: str) -> Path:
    """As find_yaml, of journey.py."""
    return find_yaml(name, {journey: CONFIGS / f"{journey}.yaml" for journey in JOURNEYS})


def find_yaml(name: str, known: dict[str, Path] | None = None) -> Path:
    """A path, or the name of a preset in configs/; known: others than train.py's. E001 with what
    may be meant."""
    path, known = Path(expand(name)), known or presets()
    files = presets() | {journey: CONFIGS / f"{journey}.yaml" for journey in JOURNEYS}
    try:
        if path.exists() and not path.is_dir():  # a pipe is right too
            return path
        if name in files:
            return files[name]
        hint = elsewhere(name, path, known)
    except (OSError, ValueError) as error:  # too long for a name, a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise UserError("E001", f"{short(name)}: {reason}") from error
    raise UserError("E001", f"{name} {hint}")


def elsewhere(name: str, path: Path, known: dict[str, Path]) -> str:
    """Why there is no configuration at `path`, and which file may be meant."""
    if path.is_dir():
        for home in (path, path.parent):  # of a run, or of one of its steps
            if (home / "config.yaml").is_file():
                return f"is a folder; did you mean {home / 'config.yaml'}? It goes on with that run"
        text = "is a folder; a YAML file, or the name of a preset, is expected"
        return text + nearby.hint(path)
    ours = CONFIGS.parent / name
    if ours.is_file():
        hint = f": {path.stem} alone names that preset" if known.get(path.stem) == ours else ""
        return f"does not exist in {Path.cwd()}; {ours} does{hint}"
    here = {p.name: p for p in path.parent.glob("*.y*ml")}
    near = here.get(nearest(path.name, here))
    if preset := nearest(path.stem, known):
        near = near or f"configs/{preset}.yaml"
    what = "journeys" if set(known) == set(JOURNEYS) else "presets"
    hint = f"did you mean {near}?" if near else f"{what}: {', '.join(known)}"
    return f"does not exist; {hint}"


def same_place(a, b) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def run_of(path: Path) -> str | None:
    """The folder of the run that a configuration lies in, which may have been moved or copied."""
    if path.name not in ("config.yaml", "resolved.yaml"):
        return None
    folder = path.parent
    a_run = (folder / "status.json").exists() or any(folder.glob("step_*/manifest.json"))
    return str(folder) if a_run else None
