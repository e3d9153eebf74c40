"""finetune.py on runs: exact as pre-training is, and only what is to be trained is trained."""

import dataclasses
import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import fingerprint, losses, read_lines
from forks import run_forked
from rig import (
    MOE,
    actions,
    at_each_step,
    at_iteration,
    bytes_data,
    decisions,
    equal,
    faulty,
    finish,
    stop_at,
    tensors,
)

import finetune
import sample
from finetune import FineTuner
from lumen import adapters, base, checkpoint, lora, schedule, setup
from lumen import machine as machines
from lumen.errors import UserError
from train import Parallel, Trainer

T = 128
WORDS = "red blue green round flat old new tall".split()
SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "max_seq_len": T}
SHAPES = {"dense": {}, "moe": MOE, "untied": {"tie_embeddings": False}}
SHAPES |= {"mod": {"mod_capacity": 0.5, "mod_anneal_steps": 3}, "dropout": {"dropout": 0.2}}
LORA = ("--lora.r", "4", "--lora.dropout", "0.1")
HOWS = {"full": (), "lora": LORA, "int8": (*LORA, "--quantize_base", "int8")}
HOWS["dpo"] = (*LORA, "--method", "dpo")


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
        data = data or (school.pairs if how == "dpo" else school.chats)
        line = [school.of(kind), "--data", data, "--out_dir", str(tmp_path / name)]
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
    pytest.param("dense", "dpo", "signal", marks=SLOW),
    pytest.param("moe", "dpo", "killed", marks=SLOW),
]


@pytest.mark.parametrize("kind, how, end", RESUMES)
def test_resume_is_exact(words, kind, how, end):
    """Packed rows, dropout in the adapters, into the second pass over the data: weights, moments,
    losses, evaluations and the orchestrator's state, byte for byte."""
    whole = tuned(words("whole", kind, how))
    if how != "dpo":
        assert 5 * 2 < whole.data.windows < 8 * 2, "the first pass ends behind the stop"
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


@pytest.mark.parametrize("how", ["full", pytest.param("dpo", marks=SLOW)])
def test_few_data_get_enough_steps_and_resume_is_exact(words, tmp_path, how, monkeypatch):
    """Neither batch nor length is written: what was taken at the start stays."""
    monkeypatch.setattr(schedule, "FEW_STEPS", 3)

    def line(name):
        line = words(name, "dense", how)
        at = line.index("--batch_size")
        return line[:at] + line[at + 6 :]

    whole = tuned(line("whole"))
    windows = whole.data.windows
    epochs = whole.cfg.num_epochs
    assert whole.run.rows_per_step == 1 and whole.step == epochs * windows >= 12
    text = f"batch_size 1, num_epochs {epochs}: {windows} rows"
    assert text in (whole.out / "train.log").read_text()
    found = yaml.safe_load((whole.out / "config.yaml").read_text())
    assert (found["batch_size"], found["max_steps"]) == (1, whole.step)
    assert stop_at(tuner(line("cut")), 4).fit() == 0
    again = tuned(line("cut"))
    assert again.started_at == 5 and again.cfg.num_epochs == epochs and again.run == whole.run
    assert fingerprint(again.out, whole.step) == fingerprint(whole.out, whole.step)
    assert not [text for text in again.found.changes if "num_epochs" in text or "batch" in text]
    # another who writes a key of them is told, and nothing is taken
    more = tuner([*line("more"), "--num_epochs", "1", "--batch_size", str(windows)])
    assert (more.run.max_steps, more.cfg.num_epochs) == (1, 1)
    more.owner.release()


@pytest.mark.parametrize("kind, how", [("moe", "lora"), pytest.param("dense", "full", marks=SLOW)])
def test_two_ranks_resume_as_one_run(words, tmp_path, kind, how):
    """Both ranks end with the same bytes, those of two that were never stopped; and near one
    process's losses."""
    more = ("--gradient_accumulation_steps", "1")
    jobs = [{"tune": words("whole", kind, how, *more), "digest": True}]
    cut = words("cut", kind, how, *more)
    jobs += [{"tune": cut, "stop_at": 4}, {"tune": cut, "digest": True}]
    said = on_two_ranks(jobs)
    said = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("RANKS ")]
    assert [row["same"] for row in said] == [True, True]
    assert said[0]["digest"] == said[1]["digest"]
    assert fingerprint(tmp_path / "cut", 8) == fingerprint(tmp_path / "whole", 8)
    alone = tuned(words("alone", kind, how))
    assert losses(tmp_path / "whole") == pytest.approx(losses(alone.out), abs=2e-5)


def on_two_ranks(jobs) -> str:
    result = run_forked("tests/programs/ranks.py", json.dumps(jobs), ranks=2, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-2000:]
    return result.stdout


def whole_tensors(out) -> dict:
    saved = checkpoint.find(out)
    return {name: saved.read(name) for name in saved.tensors}


def test_two_ranks_of_shards_train_as_one_process(words, tmp_path):
    """zero_stage: all weights but the embedding, which is frozen, decay or not; losses, norms,
    evaluations and tensors, moments too, as train_fsdp.py's."""
    more = ["--freeze", '["embeddings"]', "--weight_decay", 0.1, "--max_steps", 4]
    each = [*more, "--gradient_accumulation_steps", 1, "--zero_stage", 3]
    on_two_ranks([{"tune": words("parts", "untied", "full", *each)}])
    alone = tuned(words("alone", "untied", "full", *more))
    parts, whole = whole_tensors(tmp_path / "parts"), whole_tensors(alone.out)
    assert parts.keys() == whole.keys() and "optim.embed.weight.exp_avg" not in parts
    for name, tensor in parts.items():
        assert (tensor.double() - whole[name].double()).abs().max() <= 2e-6, name
    logs = [read_lines(out / "metrics.jsonl") for out in (tmp_path / "parts", alone.out)]
    for key, limit in (("loss", 1e-5), ("grad_norm", 1e-4), ("val_loss", 1e-5)):
        a, b = ([row[key] for row in log if key in row] for log in logs)
        assert len(a) >= 1 and a == pytest.approx(b, abs=limit), key
    frozen = alone.model.embed.weight.detach()
    assert torch.equal(parts["model.embed.weight"], frozen)


# ---------------------------------------------------------------- the loss


def replies_alone(trainer) -> float:
    """The mean loss of the first step's replies, each conversation in a forward pass of its own."""
    batch, ce, count = trainer.loader.batch(0, 4), 0.0, 0
    for x, y, docs in zip(batch.x, batch.y, batch.docs):
        for number in range(docs.max() + 1):
            own = docs == number
            if (y[own] < 0).all():  # padding
                continue
            _, sums = trainer.model(*(torch.from_numpy(t[own])[None] for t in (x, y)))
            ce, count = ce + sums["ce"].item(), count + sums["count"].item()
    return ce / count


@pytest.mark.parametrize("kind, how", [("dense", "int8"), pytest.param("moe", "full", marks=SLOW)])
def test_any_cut_of_a_step_gives_the_same_gradient(words, kind, how):
    """One row a micro-step or all four, kept activations or recomputed; each conversation is as if
    it were alone in its row; without dropout, which is drawn once a micro-step."""
    found = {}
    for micro, recompute in ((1, "none"), (4, "selective")):
        more = ["--gradient_accumulation_steps", 4 // micro, "--batch_size", micro]
        more += ["--max_steps", 3, "--activation_checkpointing", recompute]
        if how != "full":
            more += ["--lora.dropout", 0]
        trainer = tuner(words(f"{micro}", kind, how, *more))
        alone = replies_alone(trainer)
        assert trainer.fit() == 0
        assert rows(trainer, "loss")[0] == pytest.approx(alone, rel=1e-5)
        found[micro] = [rows(trainer, key) for key in ("loss", "grad_norm", "val_loss")]
    for one, four in zip(*found.values()):
        assert four == pytest.approx(one, rel=2e-5)
    assert 0 < trainer.tokens < 3 * 4 * T * 0.5


def test_val_loss_is_of_replies_and_stops_are_counted(school, words, tmp_path):
    """The loss over supervised positions by hand; and after some steps on one reply the model says
    that reply and stops."""
    trainer = tuner(words("told", "dense", "full", "--eval_interval", 2, "--max_steps", 2))
    assert trainer.fit() == 0
    source, ce, count = trainer.data.val_sources["data"], 0.0, 0
    for _, number in trainer.val_set:
        x, y, docs = (torch.as_tensor(t)[None] for t in source.row(number))
        shown = trainer.model(x, docs=docs)  # logits
        logs = torch.log_softmax(shown[0].float(), -1)
        for place in range(T):
            if y[0, place] >= 0:
                ce, count = ce - logs[place, y[0, place]].item(), count + 1
    assert rows(trainer, "val_loss")[-1] == pytest.approx(ce / count, rel=1e-4)
    assert count < len(trainer.val_set) * T * 0.5

    same = write_rows(tmp_path / "same.jsonl", lambda rng: one_reply(rng, "OK"), 60)
    how = {"val_sources": [str(write_rows(tmp_path / "v.jsonl", one_reply, 3, seed=5))]}
    bytes_data(tmp_path / "same", same, template="chatml", seq_len=T, **how)
    more = ["--max_steps", 40, "--learning_rate", 1e-2, "--batch_size", 4, "--eval_interval", 40]
    learned = tuned(words("same-run", "dense", "full", *more, data=str(tmp_path / "same")))
    row = [r for r in read_lines(learned.out / "metrics.jsonl") if "replies" in r][-1]
    asked = row["replies"]
    log = (learned.out / "train.log").read_text()
    assert row["replies_stopped"] == asked > 0 and f"stops: {asked} of {asked}" in log
    first = [r for r in read_lines(trainer.out / "metrics.jsonl") if "replies" in r][0]
    assert first["replies_stopped"] == 0, "a base that has never seen the token"


def one_reply(rng, reply: str = "OK") -> dict:
    asked = " ".join(rng.choices(WORDS, k=4))
    return {"prompt": asked, "response": reply}


def test_the_probe_takes_the_runs_own_loss(school, words, monkeypatch):
    """batch_size: auto on CUDA, its memory made up: a row of pairs is two of the model; beside what
    a pass takes lie the gradients of what is trained, not of a frozen base."""
    trainer = tuner(words("run", "dense", "lora", "--method", "dpo", data=school.pairs))
    trainer.run = dataclasses.replace(trainer.run, rows_per_step=4)
    model, seen, held = trainer.model, [], []

    def look(module, inputs):
        seen.append(len(inputs[0]))
        held.append({name for name, p in model.named_parameters() if p.grad is not None})

    model.blocks[0].register_forward_pre_hook(look)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 1000 * seen[-1])
    monkeypatch.setattr(machines, "total_memory", lambda device: 2500)
    setup.probe(trainer)
    assert seen == [4, 2] and trainer.run.micro_batch == 1
    assert held == [set(trainer.weights)] * 2 and set(trainer.weights) < set(model.state_dict())
    assert all(p.grad is None for p in model.parameters())
    trainer.close()


# ---------------------------------------------------------------- only what is to be trained


def table_of(path: str, name: str = "model.embed.weight") -> torch.Tensor:
    saved = checkpoint.find(path)
    return saved.read(name)


def test_new_control_tokens_begin_at_the_mean_and_move(school, words):
    """Under LoRA all other rows of embedding and head are the base's, to the bit."""
    for how in ("full", "lora"):
        trainer = tuner(words(how, "untied", how))
        fresh = trainer.fresh
        assert len(fresh) == 2
        found = {}

        def tables(trainer):
            named = {"embed": trainer.model.embed.weight, "head": trainer.model.head.weight}
            return {name: weight.detach().clone() for name, weight in named.items()}

        before = tables(trainer)
        assert trainer.fit() == 0
        after = tables(trainer)
        for name in ("embed", "head"):
            then = table_of(school.of("untied"), f"model.{name}.weight")
            others = torch.ones(len(then), dtype=torch.bool)
            others[fresh] = False
            assert torch.equal(before[name][others], then[others])
            for i in fresh:
                assert torch.allclose(before[name][i], then[others].mean(0), atol=1e-6)
                assert (after[name][i] - before[name][i]).abs().max() > 1e-3
            assert torch.equal(after[name][others], then[others]) == (how == "lora")
        found[how] = after


def test_a_checkpoint_of_adapters_holds_no_weights_of_the_base(words):
    trainer = tuned(words("run", "moe", "lora", "--max_steps", 2))
    saved = checkpoint.find(trainer.out)
    mine = set(lora.adapter_names(trainer.model))
    weights = {n.removeprefix("model.") for n in saved.tensors if n.startswith("model.")}
    assert mine < weights and all(".router." in name for name in weights - mine)
    assert not any(name.endswith("router.weight") for name in weights)
    moments = {n.removeprefix("optim.") for n in saved.tensors if n.startswith("optim.")}
    assert {name.rpartition(".")[0] for name in moments} == mine
    step = checkpoint.find(trainer.cfg.init_from).path
    assert saved.state["adapter"]["base_sha256"] == base.base_sha256(step)


@pytest.mark.parametrize("roles", [("embeddings", "router"), ("experts", "norms")])
def test_what_is_frozen_does_not_move_by_a_bit(words, roles):
    more = ["--freeze", json.dumps(roles), "--weight_decay", 0.1]
    trainer = tuner(words("run", "moe", "full", *more))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert trainer.fit() == 0
    singular = {name.rstrip("s") for name in roles}
    for name, p in trainer.model.named_parameters():
        frozen = base.role(name) in singular
        assert torch.equal(p, before[name]) == frozen, name
    kinds = {base.role(name) for name in before}
    assert singular < kinds
    again = tuner(words("run", "moe", "full", *more, "--max_steps", 9))
    assert equal(tensors(again), tensors(trainer)) and again.step == 8
    again.close()


def test_init_optimizer_takes_the_moments_of_the_base(school, words):
    trainer = tuner(words("run", "dense", "full", "--init_optimizer", "true"))
    then, now = checkpoint.find(school.of("dense")), trainer.tensors()
    moments = [name for name in now if name.startswith("optim.")]
    assert moments and all(torch.equal(now[name], then.read(name)) for name in moments)
    assert any(now[name].abs().sum() > 0 for name in moments if name.endswith("exp_avg"))
    trainer.close()
    without = tuner(words("without", "dense", "full"))
    assert all(not without.tensors()[name].any() for name in moments)
    without.close()


# ---------------------------------------------------------------- the orchestrator


def shake(trainer) -> None:
    """All that is trained."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.weights.values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.6)


def base_of(trainer) -> dict:
    """What is frozen."""
    return {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    "how, times, at, steps",
    [
        ("lora", float("nan"), 4, 8),
        pytest.param("lora", 1e4, 50, 60, marks=SLOW),
        pytest.param("full", 1e4, 50, 60, marks=SLOW),
    ],
)
def test_a_poisoned_batch_is_as_if_it_had_not_been(words, how, times, at, steps):
    """Adapters, moments and counts equal a run whose step was never made at that turn; a run that
    repeats its decisions has the same bytes."""
    more = ["--max_steps", steps, "--warmup_steps", 2, "--eval_interval", 0, "--save_interval", 0]
    guarded = tuned(words("guarded", "dense", how, *more), faulty([at], times))
    trigger = "explosion" if times == 1e4 else "nonfinite"
    assert actions(guarded) == [(trigger, "drop", True)] and guarded.orchestrator.dropped == 1
    skipped = tuner(words("skipped", "dense", how, *more, "--orchestrator.mode", "off"))
    step, turn = skipped.optimizer.step, skipped.orchestrator
    skipped.optimizer.step = lambda: step() if turn.iteration != at else None
    assert skipped.fit() == 0
    assert equal(tensors(guarded), tensors(skipped))
    assert 0 < skipped.tokens - guarded.tokens < 2 * T


def test_rollback_and_replay_with_adapters(words):
    """By hand, to a checkpoint: adapters and moments are those of then, the base has not moved; the
    decisions repeat to the same bytes, and not in a run with other adapters."""
    kept, states = {}, {}

    def back(trainer):
        kept["row"] = trainer.rollback_steps(2)
        kept["step"], kept["now"], kept["base"] = trainer.step, tensors(trainer), base_of(trainer)

    more = ["--max_steps", 6, "--save_interval", 2, "--val_fraction", 0]
    line = words("run", "moe", "lora", *more)
    trainer = at_iteration(tuner(line, faulty([3], float("nan"))), {5: back})
    frozen = base_of(trainer)
    at_each_step(trainer, lambda t: states.setdefault(t.step, tensors(t)))
    assert trainer.fit() == 0 and kept["row"]["executed"], kept["row"]
    assert kept["step"] == 2 and equal(kept["now"], states[2]), "the step, and moments too"
    assert equal(kept["base"], frozen) and equal(base_of(trainer), frozen)
    assert actions(trainer) == [("nonfinite", "drop", True), ("user", "rollback_steps", True)]
    replay = ["--orchestrator.mode", "replay", "--orchestrator.replay"]
    replay.append(trainer.out / "decisions.jsonl")
    line = words("again", "moe", "lora", *more, *replay)
    assert equal(tensors(tuned(line)), tensors(trainer))
    with pytest.raises(UserError, match="E310"):
        tuner(words("other", "moe", "lora", *more, "--lora.r", 8, *replay))


@pytest.mark.nightly
def test_a_loss_that_does_not_come_back_is_rolled_back(words):
    """The orchestrator sees adapters that somebody has shaken, as it sees weights."""
    more = ["--max_steps", 240, "--batch_size", 2, "--save_interval", 0, "--warmup_steps", 10]
    more += ["--orchestrator.snapshot_interval", 20, "--eval_interval", 0, "--min_lr", 1e-4]
    line = words("run", "dense", "lora", *more)
    trainer = tuned(line, iterations={150: shake})
    row = next(d for d in decisions(trainer) if d.get("action") == "rollback")
    assert row["trigger"] == "divergence" and abs(row["args"]["onset"] - 150) <= 10
    healthy = tuned(words("healthy", "dense", "lora", *more))
    assert actions(healthy) == []
    assert abs(trainer.progress.val_loss - healthy.progress.val_loss) < 0.1


# ---------------------------------------------------------------- another base


def test_adapters_go_on_with_their_own_base_only(school, words, tmp_path):
    """E311 for another model; one that moved is found by init_from; one that is gone is named."""
    home = tmp_path / "base"
    shutil.copytree(school.of("dense"), home)
    line = words("run", "dense", "lora", "--max_steps", 4)
    line[0] = str(home)
    tuned(line)
    full = words("full", "dense", "full", "--max_steps", 4)
    full[0] = str(home)
    tuned(full)
    further = [*line, "--max_steps", "6"]
    moved = tmp_path / "moved"
    home.rename(moved)
    with pytest.raises(UserError, match="E304") as gone:
        tuner(further)
    assert f"{home} does not exist; BASE" in gone.value.text
    assert tuned([*full, "--max_steps", "5"]).step == 5, "all weights are its own"
    further[0] = str(moved)
    assert tuned(further).step == 6
    other = checkpoint.find(moved).path
    shutil.rmtree(moved)
    keys = {"data_dir": str(school.top / "text"), "out_dir": str(moved), "max_steps": 4}
    keys |= {"batch_size": 2, "device": "cpu", "precision": "fp32", "seed": 1, "model": SHAPE}
    finish(keys)
    assert other.name != checkpoint.find(moved).path.name
    before = fingerprint(tmp_path / "run", 6)
    with pytest.raises(UserError, match="E311.*another model"):
        tuner([*further, "--max_steps", "8"])
    assert fingerprint(tmp_path / "run", 6) == before


# ---------------------------------------------------------------- what is refused

MESSAGES = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "RED"}]


def test_adapters_of_rank_0_are_none(words):
    trainer = tuner(words("run", "dense", "full", "--lora.r", "0"))
    assert not trainer.cfg.lora.r and all(p.requires_grad for p in trainer.model.parameters())
    trainer.close()


BAD = {  # words behind those of a run of full fine-tuning on chats: code, what is said
    "no such target": (["--lora.r", 4, "--lora.targets", "[wqv]"], "E002.*wqv.*wqkv"),
    "lora without r": (["--lora.alpha", 4], "E002.*lora needs r"),
    "auto alone": (["--batch_size", "auto"], "E002.*the usual 16 rows are batch_tokens: "),
    "few bits without lora": (["--quantize_base", "int8"], "E002.*quantize_base"),
    "no bitsandbytes": (["--lora.r", 4, "--quantize_base", "nf4"], "E003.*bitsandbytes"),
    "no such role": (["--freeze", "[rooter]"], "E002.*rooter is none of"),
    "no weights of it": (["--freeze", "[experts]"], "E002.*has no expert"),
    "nothing left": (["--freeze", "[embeddings,norms,matrix]"], "E002.*nothing is left"),
    "frozen twice": (["--lora.r", 4, "--freeze", "[norms]"], "E002.*freeze"),
    "moments of what is frozen": (["--lora.r", 4, "--init_optimizer", "true"], "E002.*moments"),
    "beta": (["--beta", 0.2], "E002.*beta is of preferences"),
    "chats for dpo": (["--method", "dpo"], "E124.*conversations"),
    "pairs for sft": ("pairs", "E124.*preference pairs"),
    "rows of another length": (["--model.max_seq_len", 64], "E123.*128"),
    "no such file": ("nothing.jsonl", "E108.*nothing.jsonl"),
    "another template": (["--prompt_template", "instruct"], "E002.*prepared with chatml"),
    "prepared folders together": (["--data", "more.jsonl"], "E002.*is prepared"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_before_anything_is_written(school, words, monkeypatch, name):
    more, said = BAD[name]
    if name == "no bitsandbytes":
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    data = {"pairs": school.pairs, "nothing.jsonl": "nothing.jsonl"}.get(str(more))
    with pytest.raises(UserError, match=f"(?s)^{said}"):
        tuner(words("run", "dense", "full", *([] if data else more), data=data))
    out = Path(words("run")[4])
    assert not out.exists() and not list(out.parent.iterdir())


@pytest.mark.parametrize(
    "row, said",
    [
        ({"messages": [*MESSAGES[:1], MESSAGES[1] | {"content": " "}]}, "message 2 is empty"),
        ({"messages": [MESSAGES[0] | {"role": "boss"}, MESSAGES[1]]}, "role 'boss' is none of"),
        ({"messages": MESSAGES[:1]}, "there is no reply"),
    ],
)
def test_a_bad_row_is_named(words, tmp_path, row, said):
    """By file and line; nothing of the run is there, of the data only what was rejected."""
    write_rows(tmp_path / "bad.jsonl", lambda rng: {"messages": MESSAGES}, 1)
    with open(tmp_path / "bad.jsonl", "a") as file:
        file.write("\n" + json.dumps(row))
    line = prepared_here(words("run"), tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match=f"E109.*bad.jsonl:2: .*{said}"):
        tuner(line)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "data"]
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["rejected.jsonl"]


def test_as_many_bad_rows_as_the_refusal_names_are_gone_without(words, tmp_path):
    """Its remedy, --max_bad, is a word of finetune.py."""
    write_rows(tmp_path / "bad.jsonl", lambda rng: {"messages": MESSAGES}, 1)
    with open(tmp_path / "bad.jsonl", "a") as file:
        file.write('\n{"messages": []}')
    line = prepared_here(words("run"), tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="(?s)E109.*--max_bad 0.5 does without"):
        tuner(line)
    spec = finetune.read([*line, "--max_bad", "0.5"])[0].prepare
    assert spec["max_bad"] == 0.5 and spec["sources"] == [str(tmp_path / "bad.jsonl")]


def test_a_dry_run_needs_no_data_and_keeps_the_laws_to_itself(school, words, tmp_path, capsys):
    """Before conversations are prepared their length is unknown; Chinchilla is of other runs."""
    write_rows(tmp_path / "chats.jsonl", conversation, 4)
    line = [school.of("dense"), "--data", str(tmp_path / "chats.jsonl"), "--device", "cpu"]
    assert finetune.main([*line, "--dry_run"]) == 0
    assert "length     unknown" in capsys.readouterr().out
    assert finetune.main([*words("run"), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "8 steps" in said and "plan  " not in said


def prepared_here(line, file) -> list[str]:
    """Its data are these, and prepared beside them."""
    spec = {"sources": [str(file)], "out": str(file.parent / "data")}
    return [line[0], "--prepare", json.dumps(spec), *line[3:]]


def test_a_base_that_is_none(school, words, tmp_path):
    line = words("run")
    run = tuned([*words("lora", "dense", "lora"), "--max_steps", "1"]).out
    for path, said in (
        (school.top / "text", "E304"),
        (tmp_path / "nowhere", "E304.*nowhere does not exist; BASE"),
        (run, "E125.*holds adapters.*finetune.py merge"),
    ):
        line[0] = str(path)
        with pytest.raises(UserError, match=said):
            tuner(line)
    with pytest.raises(UserError, match="E125.*which model"):
        tuner(line[1:])
    with pytest.raises(UserError, match="E125.*which data"):
        tuner([school.of("dense"), *words("run")[3:]])


def test_an_out_dir_that_holds_another_run(school, words, tmp_path):
    """Other adapters, all weights, train.py's run; train.py does not go on with ours."""
    more = ["--max_steps", 1]
    trainer = tuned(words("run", "dense", "lora", *more))
    before = fingerprint(trainer.out, 1)
    for how, other, said in (
        ("full", [], "E305.*r: 4 there, 0 here"),
        ("lora", ["--lora.alpha", 7], "E305.*alpha"),
        ("lora", ["--lora.targets", "[wo]"], "E305.*targets: 8 there, 2 here"),
        ("int8", [], "E305.*quantize_base"),
    ):
        with pytest.raises(UserError, match=said):
            tuner(words("run", "dense", how, *more, *other))
    assert fingerprint(trainer.out, 1) == before
    shutil.copytree(school.of("dense"), tmp_path / "pre")
    with pytest.raises(UserError, match="E300.*of train.py"):
        tuner(words("pre", "dense", "full", *more, "--allow_data_change", "true"))
    full = tuned(words("full", "dense", "full", *more))
    keys = {"data_dir": school.chats, "out_dir": str(full.out), "max_steps": 2}
    with pytest.raises(UserError, match="E300.*of finetune.py"):
        Trainer(keys | {"batch_size": 2, "device": "cpu", "model": SHAPE})
    line = words("full", "dense", "full", "--max_steps", 2)
    line[0] = school.of("untied")
    with pytest.raises(UserError, match="E305|E311"):
        tuner(line)


def test_longer_conversations_are_cut_and_counted(words, tmp_path):
    """And rows longer than the base has seen are told of."""
    long = {"messages": [MESSAGES[0], MESSAGES[1] | {"content": "RED " * 200}]}
    write_rows(tmp_path / "chats.jsonl", conversation, 12)
    with open(tmp_path / "chats.jsonl", "a") as file:
        file.write("\n" + json.dumps(long))
    line = words("run", "dense", "full", "--max_steps", 1)
    trainer = tuned(prepared_here(line, tmp_path / "chats.jsonl"))
    log = (trainer.out / "train.log").read_text()
    assert "of 13 conversations 1 truncated" in log
    how = {"template": "chatml", "seq_len": 2 * T}
    bytes_data(tmp_path / "long", tmp_path / "chats.jsonl", **how)
    found = finetune.read(words("longer", data=str(tmp_path / "long")))
    assert found[0].model.max_seq_len == 2 * T
    assert any("has seen 128 at most" in note for note in found[2])


# ---------------------------------------------------------------- what else a base brings


def test_depth_that_was_annealed_is_not_annealed_again(school, words, tmp_path):
    """MoD: a base at its capacity went up to 1.0, and merged adapters stayed there."""
    line = words("run", "mod", "lora", "--max_steps", 2)
    trainer = tuned(line)
    assert [mod.capacity for mod in trainer.mod.values()] == [0.5, 0.5]
    adapters.merge(trainer.out, tmp_path / "whole", say=print)
    model, *_ = sample.load(tmp_path / "whole", device="cpu", precision="fp32")
    assert [mod.capacity for mod in model.sparse_layers("mod").values()] == [0.5, 0.5]


# ---------------------------------------------------------------- what cannot go on, or has no effect


def anew(line, *more):
    """To step 4, then the same command with these words, which is not carried out."""
    tuned([*line, "--max_steps", "4"])
    return tuner([*line, "--max_steps", "6", *more])


def test_a_run_of_all_weights_goes_on_without_its_base(school, words, tmp_path):
    home = tmp_path / "base"
    shutil.copytree(school.of("dense"), home)
    line = words("run", "dense", "full", "--max_steps", 4)
    line[0] = str(home)
    tuned(line)
    shutil.rmtree(home)
    assert tuned([*line, "--max_steps", "6"]).step == 6
    line[-4:] = ["--out_dir", str(tmp_path / "other"), "--max_steps", "6"]
    with pytest.raises(UserError, match=f"E304.*{home}"):
        tuner(line)


def test_a_step_that_this_is_no_continuation_of_is_refused(school, words, tmp_path):
    """A run of train.py, and one that began without a reference: both ended in a KeyError."""
    pairs = words("pairs", data=school.pairs)
    simpo = [*pairs, "--method", "simpo"]
    with pytest.raises(UserError, match="E312.*method was simpo.*init_from"):
        anew(simpo, "--method", "dpo")
    keys = {"data_dir": school.chats, "out_dir": str(tmp_path / "run"), "max_steps": 2}
    keys |= {"batch_size": 2, "device": "cpu", "precision": "fp32", "model": SHAPE}
    finish(keys | {"eval_tokens": T})
    for how in ("full", "lora"):
        with pytest.raises(UserError, match="E300.*is of train.py"):
            tuner(words("run", "dense", how))


def test_adapters_keep_the_slots_of_their_base(words):
    """More of them would have been trained, and then not been read."""
    of_experts = words("run", "moe", "lora", "--lora.targets", "[experts]")
    with pytest.raises(UserError, match="E002.*lora.dropout: 0.1: adapters of experts have none"):
        tuner(of_experts)
    with pytest.raises(UserError, match="E002.*n_experts_max.*stays the base's, 5"):
        tuner(words("run", "moe", "lora", "--model.n_experts_max", 8))
    trainer = tuner(words("run", "moe", "lora"))
    before = tensors(trainer)
    assert trainer.prune_expert(0, 1, force=True)["refused"] == "E308"
    assert equal(tensors(trainer), before)
    trainer.close()


def test_a_reference_knows_the_positions_it_was_made_with(school, words, tmp_path):
    """rope_theta may be other than the base's: the file of a run without that was read."""
    data = tmp_path / "pairs"
    shutil.copytree(school.pairs, data)
    seen = set()
    for theta in (10000.0, 500.0):
        more = ("--method", "dpo", "--model.rope_theta", theta)
        tuner(words(f"run-{theta}", "dense", "full", *more, data=str(data))).close()
        seen.add(len(list(data.glob("reference-*.npy"))))
    assert seen == {1, 2}


def test_dropout_of_the_base_is_off_between_two_replies(school, words):
    for method, data, p in (("sft", school.chats, 0.2), ("dpo", school.pairs, 0.0)):
        trainer = tuner(words(method, "dropout", "full", "--method", method, data=data))
        assert trainer.cfg.model.dropout == p
        trainer.close()


def test_sources_of_two_templates_are_refused(school, words, tmp_path):
    """The run would have spoken the first, and learned to end its replies in two ways."""
    sources = {"a": {"dir": school.chats}, "b": {"dir": str(tmp_path / "b")}}
    bytes_data(tmp_path / "b", school.top / "chats.jsonl", template="instruct", seq_len=T)
    line = words("run")
    line[1:3] = ["--data", json.dumps({"sources": sources})]
    with pytest.raises(UserError, match="E113.*a chatml, b instruct"):
        tuner(line)


def test_no_question_is_shown_where_all_is_learned(school, words, tmp_path):
    held_out = [str(school.top / "chats-val.jsonl")]
    how = {"val_sources": held_out, "template": "chatml", "seq_len": T, "loss_on": "all"}
    bytes_data(tmp_path / "all", school.top / "chats.jsonl", **how)
    trainer = tuned(words("run", "dense", "full", "--max_steps", 1, data=str(tmp_path / "all")))
    assert not rows(trainer, "replies") and rows(trainer, "val_loss")


@pytest.mark.nightly
def test_tasks_on_the_way_are_asked_with_the_template_of_the_data(words, tmp_path):
    question = {"question": "red blue", "choices": ["RED BLUE", "red"], "answer": 0}
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(json.dumps(question) for _ in range(3)))
    run = tuner(words("a", "moe", "lora", "--evaluate.every", 3, "--evaluate.tasks", file))
    (task,) = run.in_training.tasks
    ask_one, templates = task.line, set()

    def line(i, asked):
        templates.add(asked.template)
        return ask_one(i, asked)

    task.line = line
    assert run.fit() == 0
    assert templates == {run.template} and run.template.name == "chatml"
    assert len(rows(run, "eval/own/acc")) == 3
    without = tuned(words("b", "moe", "lora"))
    assert equal(tensors(run), tensors(without))
