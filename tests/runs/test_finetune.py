"""finetune.py on runs: exact as pre-training is, and only what is to be trained is trained."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
from conftest import fingerprint, losses, read_lines
from rig import MOE, at_iteration, bytes_data, finish, stop_at

import finetune
from finetune import FineTuner
from train import Parallel

T = 128
WORDS = "red blue green round flat old new tall".split()
SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "max_seq_len": T}
SHAPES = {"dense": {}, "moe": MOE, "untied": {"tie_embeddings": False}}
LORA = ("--lora.r", "4", "--lora.dropout", "0.1")
HOWS = {"full": (), "lora": LORA, "int8": (*LORA, "--quantize_base", "int8")}


def sentence(rng) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 3)))


def conversation(rng) -> dict:
    turns = []
    for _ in range(rng.randint(1, 2)):
        asked = sentence(rng)
        turns.append({"role": "user", "content": asked})
        turns.append({"role": "assistant", "content": asked.upper()})
    return {"messages": turns}


def preference(rng) -> dict:
    asked = sentence(rng)
    return {"prompt": asked, "chosen": asked.upper(), "rejected": sentence(rng)}


def write_rows(path, make, n: int, seed: int = 0):
    rng = random.Random(seed)
    path.write_text("\n".join(json.dumps(make(rng)) for _ in range(n)))
    return path


@pytest.fixture(scope="session")
def school(tmp_path_factory) -> SimpleNamespace:
    """Bases of a few steps of text, and conversations and pairs that fill a dozen rows."""
    top = tmp_path_factory.mktemp("school")
    rng = random.Random(0)
    text = top / "text.txt"
    text.write_text("\n".join(sentence(rng) for _ in range(1000)))
    bytes_data(top / "text", text)
    for kind, make in (("chats", conversation), ("pairs", preference)):
        rows = write_rows(top / f"{kind}.jsonl", make, 22)
        held_out = write_rows(top / f"{kind}-val.jsonl", make, 6, seed=1)
        how = {"val_sources": [str(held_out)], "template": "chatml", "seq_len": T}
        bytes_data(top / kind, rows, **how)
    found = SimpleNamespace(top=top, chats=str(top / "chats"), pairs=str(top / "pairs"), bases={})

    def of(kind: str) -> str:
        """The base of this shape; made when it is asked for."""
        if kind not in found.bases:
            out = top / kind
            keys = {"data_dir": str(top / "text"), "out_dir": str(out), "max_steps": 3}
            keys |= {"batch_size": 2, "device": "cpu", "precision": "fp32", "learning_rate": 3e-3}
            finish(keys | {"eval_tokens": T, "model": SHAPE | SHAPES[kind]})
            found.bases[kind] = str(out)
        return found.bases[kind]

    found.of = of
    return found


@pytest.fixture
def words(school, tmp_path):
    """words(name, kind of base, how it is trained, more words ...) -> a command line of
    finetune.py: a row a micro-step, two a step, a dozen rows in all."""

    def make(name, kind="dense", how="full", *more, data=None) -> list[str]:
        line = [school.of(kind), "--data", data or school.chats, "--out_dir", str(tmp_path / name)]
        line += ["--device", "cpu", "--precision", "fp32", "--compile_model", "false"]
        line += ["--batch_size", "1", "--gradient_accumulation_steps", "2", "--max_steps", "8"]
        line += ["--learning_rate", "3e-3", "--save_interval", "4", "--log_interval", "1"]
        line += ["--save_total_limit", "0", "--eval_interval", "4", *HOWS[how]]
        return line + [str(word) for word in more]

    return make


def tuner(line, parallel=Parallel) -> FineTuner:
    return FineTuner(finetune.read(line), parallel)


def tuned(line, parallel=Parallel, iterations=None) -> FineTuner:
    """To the end, which is a good one."""
    trainer = at_iteration(tuner(line, parallel), iterations or {})
    assert trainer.fit() == 0
    return trainer


def rows(trainer, key) -> list:
    return [r[key] for r in read_lines(trainer.out / "metrics.jsonl") if key in r]


# ---------------------------------------------------------------- exact resume

SLOW = pytest.mark.nightly
RESUMES = [  # kind, how, what ends the first run; pairwise, the rest at night
    ("dense", "full", "signal"),
    ("dense", "int8", "killed"),
    ("moe", "lora", "signal"),
    pytest.param("moe", "full", "killed", marks=SLOW),
    pytest.param("dense", "lora", "signal", marks=SLOW),
    pytest.param("moe", "int8", "signal", marks=SLOW),
    pytest.param("untied", "lora", "killed", marks=SLOW),
    pytest.param("moe", "lora", "killed", marks=SLOW),
]


@pytest.mark.parametrize("kind, how, end", RESUMES)
def test_resume_is_exact(words, kind, how, end):
    """Packed rows, dropout in the adapters, into the second pass over the data: weights, moments,
    losses, evaluations and the orchestrator's state, byte for byte."""
    whole = tuned(words("whole", kind, how))
    assert 5 * 2 < whole.data.windows < 8 * 2, "the first pass ends between the stop and the end"
    if end == "signal":
        first = stop_at(tuner(words("cut", kind, how)), 4)
        assert first.fit() == 0 and first.step == 5
        cut = first.out
    else:  # the newest step is lost, half of it had been written
        cut = whole.out.with_name("cut")
        shutil.copytree(whole.out, cut)
        (cut / "step_00000008").rename(cut / "step_00000008.tmp")
        (cut / "step_00000008.tmp" / "manifest.json").unlink()
        (cut / "best.json").unlink()
    again = tuned(words("cut", kind, how))
    assert again.started_at == (5 if end == "signal" else 4)
    assert fingerprint(cut, 8) == fingerprint(whole.out, 8)
    assert losses(cut) == losses(whole.out) and again.beside == whole.beside
