"""The training modes of LuminaAI, written out as `data`: what they say, in Lumen's own keys.

training_mode: base_only | finetuning_only | hybrid_sequential | hybrid_interleaved
base_paths, finetuning_paths: folders that prepare_data.py has made; one of them alone: files too
base_ratio: 0.7, the share of rows that are base; mix_strategy: ratio | alternating | random
base_epochs, finetuning_epochs: of hybrid_sequential's phases, else num_epochs
curriculum_aggressiveness: 0 to 1, how far easy comes before hard
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from lumen import mixture
from lumen.errors import UserError, expand
from lumen.files import read_json
from lumen.values import as_number, convert, inside, short
from lumen.windows import Shard, bare_shards, holds_text
from model import ModelConfig

GROUPS = ("base", "finetuning")  # of paths
# mode: the groups that it reads
MODES = {
    "base_only": ["base"],
    "finetuning_only": ["finetuning"],
    "hybrid_sequential": ["base", "finetuning"],
    "hybrid_interleaved": ["base", "finetuning"],
}
# what their code calls them
OTHER_NAMES = {"instruction_only": "finetuning_only", "hybrid": "hybrid_sequential"}
OTHER_NAMES |= {"interleaved": "hybrid_interleaved"}
STRATEGIES = ("ratio", "alternating", "random")
PATHS = ("training_mode", "base_paths", "finetuning_paths", "base_eval_paths")
PATHS += ("finetuning_eval_paths", "base_ratio", "mix_strategy", "base_epochs", "finetuning_epochs")
TUNES = "python finetune.py BASE --data FILE"
CURRICULUM = "curriculum_aggressiveness"
KEYS = (*PATHS, CURRICULUM)
BUCKETS = 3  # of every source, for curriculum_aggressiveness


def expand_modes(tree: dict, place, notes: list[str]) -> None:
    """Put `data` (or `prepare`) in the place of the keys above, in `tree`; notes say what it is.
    E002 for what cannot be honoured, E110 where there is no prepared folder."""
    given = {key: tree.pop(key) for key in PATHS if key in tree}
    aggressiveness = tree.pop(CURRICULUM, None)
    if any(value is not None for value in given.values()):
        Expansion(given, tree, place, notes).write()
    if aggressiveness is not None:
        add_curriculum(tree, aggressiveness, place, notes)


def add_curriculum(tree: dict, value, place, notes: list[str]) -> None:
    """`data.curriculum`, and buckets for sources that have none."""
    name = CURRICULUM
    if not as_number(value, float):  # 0 asks for nothing
        notes.append(f"{name} {short(value)} has no effect: rows are shuffled")
        return
    if tree.get("data_dir") and not tree.get("data") and not tree.get("prepare"):
        tree["data"] = {"sources": {"data": {"dir": tree.pop("data_dir")}}}
    if not isinstance(tree.get("data"), dict) or not isinstance(tree["data"].get("sources"), dict):
        text = f"{name}: difficulty is of prepared data: make it first, then data_dir: FOLDER"
        raise UserError("E002", f"{place(name)}: {text}")
    if not any("buckets" in spec for spec in tree["data"]["sources"].values()):
        for spec in tree["data"]["sources"].values():
            spec |= {"buckets": BUCKETS, "difficulty": "length"}
    tree["data"]["curriculum"] = value
    notes.append(f"{name} -> data.curriculum {value}, over buckets by the length of documents")


@dataclass
class Expansion:
    """One training mode, from its keys to `data`."""

    given: dict  # the keys as written
    tree: dict  # all others
    place: object  # key -> file and line
    notes: list[str]
    used: set[str] = field(default_factory=set)

    def get(self, key: str):
        self.used.add(key)
        return self.given.get(key)

    def refuse(self, key: str, text: str):
        raise UserError("E002", f"{self.place(key)}: {key}: {text}")

    # ---- the keys, one by one

    def mode(self) -> str:
        """One of MODES; where it is not written, the one that the paths leave."""
        mode = self.get("training_mode")
        groups = [group for group in GROUPS if self.given.get(f"{group}_paths")]
        if mode is None and len(groups) == 1:
            mode = f"{groups[0]}_only"
        mode = OTHER_NAMES.get(mode, mode)
        if mode not in MODES:
            self.refuse("training_mode", f"{short(mode)} is not one of {', '.join(MODES)}")
        return mode

    def paths(self, group: str) -> list[str]:
        key = f"{group}_paths"
        paths = self.get(key)
        if not paths:
            self.refuse(key, f"is needed: [{group} FOLDER, ...], as prepare_data.py makes them")
        paths = inside(paths, [str], self.place, key)
        return [expand(path, f"{self.place(key)}: {key}") for path in paths]

    def number(self, key: str, default: float | None) -> float | None:
        value = self.get(key)
        if value is None:
            return default
        return convert(value, float, f"{self.place(key)}: {key}")

    def base_share(self) -> float:
        """Of the rows of hybrid_interleaved."""
        strategy = self.get("mix_strategy") or "ratio"
        if strategy not in STRATEGIES:
            text = f"{short(strategy)} is not one of {', '.join(STRATEGIES)}"
            self.refuse("mix_strategy", text)
        written = self.number("base_ratio", None)
        share = 0.7 if written is None else written
        if not 0 < share < 1:
            self.refuse("base_ratio", f"{share:g} must be in (0, 1); base_only is 1")
        if strategy == "alternating":
            if written not in (None, 0.5):
                text = "alternating takes as many of each, which is base_ratio: 0.5; drop one"
                self.refuse("mix_strategy", text)
            share = 0.5
        if strategy != "ratio":
            text = f"mix_strategy {strategy}: base_ratio {share:g}, exact in each 1,024 rows, which"
            self.notes.append(f"{text} are shuffled")
        return share

    # ---- what they say

    def write(self) -> None:
        """Into the tree. E002; E110 where there is text and no tokens."""
        mode = self.mode()
        for key in ("data", "data_dir", "prepare"):
            if names_data(self.tree, key):
                text = f"says what is trained on, and so does {key}; drop one"
                self.refuse("training_mode", text)
        paths = {group: self.paths(group) for group in MODES[mode]}
        group = MODES[mode][0]
        if len(paths) == 1 and all(is_raw(path) for path in paths[group]):
            made = {"prepare": self.prepare(group, paths[group])}
            if group == "finetuning":
                self.notes.append(f"from scratch; for a model that there is: {TUNES}")
        else:
            made = {"data": self.data(mode, paths)}
        self.tree |= made
        self.notes += mixture.told(f"training_mode: {mode} is, in keys of Lumen", made)
        unused = [key for key, v in self.given.items() if key not in self.used and v is not None]
        if unused:
            text = f"{', '.join(unused)} has no effect: training_mode is {mode}"
            self.notes.append(text)

    def prepare(self, group: str, paths: list[str]) -> dict:
        """Text is prepared on the first start, as the key `prepare` does it."""
        spec = {"sources": paths} | (self.tree.get("prepare") or {})
        key = f"{group}_eval_paths"
        held_out = self.get(key)
        if held_out and "val_sources" in spec:
            self.refuse(key, "prepare has val_sources too; drop one")
        if held_out:
            spec["val_sources"] = inside(held_out, [str], self.place, key)
        return spec

    def data(self, mode: str, paths: dict[str, list[str]]) -> dict:
        for group in paths:
            if self.get(f"{group}_eval_paths"):
                text = "a prepared folder holds its own val split: prepare_data.py makes it of"
                self.refuse(f"{group}_eval_paths", f"{text} --val FILE; drop this key")
        share = {"base": 1.0, "finetuning": 1.0}
        if mode == "hybrid_interleaved":
            base = self.base_share()
            share = {"base": base, "finetuning": round(1 - base, 6)}
        sources, weights = {}, {}
        for group, folders in paths.items():
            weights[group] = self.weigh(group, folders, share[group])
            for (name, weight), folder in zip(weights[group].items(), folders):
                sources[name] = {"dir": folder, "weight": weight}
        if mode != "hybrid_sequential":
            return {"sources": sources}
        for spec in sources.values():
            del spec["weight"]  # phases say it
        return {"sources": sources, "phases": self.phases(weights)}

    def phases(self, weights: dict[str, dict]) -> list[dict]:
        """First all of base, then all of fine-tuning, each so many times."""
        epochs = self.tree.pop("num_epochs", None)
        epochs = 1.0 if epochs is None else convert(epochs, float, self.place("num_epochs"))
        phases = []
        for group, each in weights.items():
            passes = self.number(f"{group}_epochs", epochs)
            phases.append({"name": group, "epochs": passes, "weights": each})
        return phases

    def weigh(self, group: str, folders: list[str], share: float) -> dict[str, float]:
        """Names and weights of a group's folders: by their tokens, as if they were one."""
        names = [group]
        if len(folders) > 1:
            names = [f"{group}_{i + 1}" for i in range(len(folders))]
        tokens = [self.tokens_in(group, folder) for folder in folders]
        return {n: round(share * t / max(1, sum(tokens)), 6) for n, t in zip(names, tokens)}

    def tokens_in(self, group: str, folder: str) -> int:
        """Of the training split. E110 where the folder holds text, with what makes tokens of it;
        E002 where it holds several datasets."""
        key = f"{group}_paths"
        if is_raw(folder):
            text = f"{self.place(key)}: {folder} is text, not tokens: {self.command(group, folder)}"
            text = f"{text}, then {key}: [data/{group}]"
            if group == "finetuning":
                text += f"; or python finetune.py BASE --data {folder}, on a model that there is"
            raise UserError("E110", text)
        if os.path.exists(os.path.join(folder, mixture.FILE)):
            text = f"{folder} holds several datasets; name each of them, or drop all of these keys"
            self.refuse(key, f"{text} and write data_dir: {folder}")
        file = os.path.join(folder, "manifest.json")
        if not os.path.exists(file):
            return sum(Shard(shard).tokens for shard in bare_shards(folder))
        try:
            return int(read_json(file, "E111")["splits"]["train"]["tokens"])
        except (LookupError, TypeError, ValueError) as error:
            text = f"{file} is damaged: {type(error).__name__} {error}"
            raise UserError("E111", text) from None

    def command(self, group: str, folder: str) -> str:
        """What prepares text, or conversations in rows of the model's length."""
        made = f"python prepare_data.py {folder} --out data/{group} --tokenizer"
        if group == "base":
            return f"{made} bpe:8192"
        tokenizer = "bpe:8192"
        if self.given.get("base_paths"):
            base = inside(self.given["base_paths"], [str], self.place, "base_paths")[0]
            tokenizer = os.path.join("data/base" if is_raw(base) else base, "tokenizer.json")
        T = self.tree["model"].get("max_seq_len", ModelConfig.max_seq_len)
        return f"{made} {tokenizer} (conversations: --seq_len {T})"


def names_text(tree: dict) -> bool:
    """Whether its paths are text of one group, which is prepared on the first start."""
    groups = [tree[f"{group}_paths"] for group in GROUPS if tree.get(f"{group}_paths")]
    paths = groups[0] if len(groups) == 1 else []
    paths = [paths] if isinstance(paths, str) else paths
    if not paths or not isinstance(paths, list):
        return False
    return all(isinstance(path, str) and is_raw(os.path.expanduser(path)) for path in paths)


def names_data(tree: dict, key: str) -> bool:
    """Whether data, data_dir or prepare says what is trained on; prepare may hold options only."""
    value = tree.get(key)
    return bool(value and (key != "prepare" or not isinstance(value, dict) or value.get("sources")))


def finetuning_paths(tree: dict, place, notes: list[str]) -> None:
    """Of finetune.py, in place: the paths of finetuning_only are its data, where they are no
    folders of prepare_data.py. E002 for a mode that trains on a base's text too."""
    mode = tree.get("training_mode")
    paths = tree.get("finetuning_paths")
    if mode is not None and OTHER_NAMES.get(mode, mode) != "finetuning_only":
        text = f"training_mode: {short(mode)} is train.py's; finetune.py trains a BASE on"
        raise UserError("E002", f"{place('training_mode')}: {text} conversations: finetuning_only")
    if not paths or any(names_data(tree, key) for key in ("data", "data_dir", "prepare")):
        return
    paths = inside(paths, [str], place, "finetuning_paths")
    paths = [expand(path, f"{place('finetuning_paths')}: finetuning_paths") for path in paths]
    if not any(is_raw(path) for path in paths):
        return  # as in train.py
    spec = {"sources": paths}
    notes.append(f"finetuning_paths -> prepare.sources {short(paths)}")
    if held_out := tree.get("finetuning_eval_paths"):
        spec["val_sources"] = held_out
        notes.append(f"finetuning_eval_paths -> prepare.val_sources {short(held_out)}")
    for key in ("training_mode", "finetuning_paths", "finetuning_eval_paths"):
        tree.pop(key, None)
    tree["prepare"] = (tree.get("prepare") or {}) | spec


def is_raw(path: str) -> bool:
    """Whether there is text, and no prepared folder, finished or not."""
    ours = ("manifest.json", "progress.json", mixture.FILE)
    return not any(os.path.exists(os.path.join(path, name)) for name in ours) and holds_text(path)
