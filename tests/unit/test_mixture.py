"""Mixtures: what modes, phases, a curriculum and buckets are, written out; and that no window is
lost or read twice by any of them."""

import collections
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lumen import buckets, forecast, lines, mixture
from lumen.cli import read_config
from lumen.config import RANGES, Config, build_config
from lumen.data import Data, choose_val_rows, facts_of, open_data, what_changed
from lumen.errors import UserError
from lumen.loader import BLOCK, Loader
from lumen.schedule import lr_at, mixture_lines, phase_ends, resolve_order, resolve_phases
from lumen.windows import Source

few = settings(max_examples=20, deadline=None)
MODEL = {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 8}


def configured(notes=None, **keys) -> Config:
    tree = {"model": dict(MODEL), **keys}
    return build_config(tree, lambda key: f"at {key}", [] if notes is None else notes)


def fails(code, f, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        f(*args, **kwargs)
    assert caught.value.code == code, caught.value
    return caught.value.text


def prepared(folder, lengths, seed=0, **more) -> str:
    """A prepared folder with documents of these lengths, as prepare_data.py leaves it."""
    os.makedirs(folder)
    np.save(folder / "train_00000.mask.npy", np.ones(sum(lengths), np.uint8))
    tokens = np.random.default_rng(seed).integers(0, 60, sum(lengths)).astype(np.uint16)
    np.save(folder / "train_00000.npy", tokens)
    begins = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)
    np.save(folder / "train_00000.docs.npy", begins)
    shard = {"file": "train_00000.npy", "tokens": len(tokens), "max_id": 63, "sha256": f"{seed}"}
    shard["docs_file"] = "train_00000.docs.npy"
    if more.get("kind") == "chat":
        shard["mask_file"] = "train_00000.mask.npy"
    manifest = {
        "dtype": "uint16",
        "fingerprint": f"{seed}{more}",
        "splits": {"train": {"tokens": len(tokens), "shards": [shard]}, "val": {"shards": []}},
        "tokenizer": {"sha256": "t", "n_vocab": 64},
        "settings": {"seed": seed},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | more))
    return str(folder)


# ---------------------------------------------------------------- training modes


@pytest.fixture
def folders(tmp_path):
    sizes = {"web": [300, 300], "code": [200], "sft": [100]}
    made = {name: prepared(tmp_path / name, n, seed=i) for i, (name, n) in enumerate(sizes.items())}
    (tmp_path / "raw.txt").write_text("text")
    return made | {"raw": str(tmp_path / "raw.txt")}


def data_of(folders, **keys) -> tuple[dict, list[str]]:
    paths = {}
    for key in list(keys):
        if key.endswith("_paths"):
            paths[key] = [folders[name] for name in keys.pop(key)]
    notes = []
    return configured(notes, **paths, **keys).data, notes


BASE = {"base_paths": ["web"]}
BOTH = BASE | {"finetuning_paths": ["sft"]}
SPLIT = [{"web": 0.7, "sft": 0.3}, {"web": 0.5, "sft": 0.5}, {"web": 0.2, "sft": 0.8}]


@pytest.mark.parametrize(
    "keys, weights, epochs",
    [
        ({"training_mode": "base_only", **BOTH}, {"web": 1}, None),
        (BASE, {"web": 1}, None),
        ({"base_paths": ["web", "code"]}, {"web": 0.75, "code": 0.25}, None),  # 600 and 200 tokens
        ({"training_mode": "finetuning_only", **BOTH}, {"sft": 1}, None),
        ({"training_mode": "instruction_only", **BOTH}, {"sft": 1}, None),
        ({"training_mode": "hybrid_interleaved", **BOTH}, SPLIT[0], None),
        ({"training_mode": "interleaved", "base_ratio": "0.2", **BOTH}, SPLIT[2], None),
        (
            {"training_mode": "hybrid_interleaved", "mix_strategy": "alternating", **BOTH},
            SPLIT[1],
            None,
        ),
        ({"training_mode": "hybrid_interleaved", "mix_strategy": "random", **BOTH}, SPLIT[0], None),
        (
            {"training_mode": "hybrid_interleaved", "base_finetuning_ratio": 0.5, **BOTH},
            SPLIT[1],
            None,
        ),
        ({"training_mode": "hybrid_sequential", **BOTH}, None, [1, 1]),
        ({"training_mode": "hybrid", "num_epochs": 3, **BOTH}, None, [3, 3]),
        (
            {"training_mode": "hybrid_sequential", "epochs": 2, "base_epochs": 0.5, **BOTH},
            None,
            [0.5, 2],
        ),
    ],
)
def test_a_training_mode_is_a_few_lines_of_data_which_are_printed(folders, keys, weights, epochs):
    data, notes = data_of(folders, **keys)
    home = {folder: name for name, folder in folders.items()}
    if weights is None:
        assert [phase["weights"] for phase in data["phases"]] == [{"base": 1}, {"finetuning": 1}]
        assert [phase["epochs"] for phase in data["phases"]] == epochs
        assert {home[spec["dir"]] for spec in data["sources"].values()} == {"web", "sft"}
    else:
        assert {home[s["dir"]]: s["weight"] for s in data["sources"].values()} == weights
        assert "phases" not in data
    # what is printed is YAML that means the same
    at = next(i for i, note in enumerate(notes) if note.endswith("in keys of Lumen:"))
    shown = [note for note in notes[at + 1 :] if note.startswith("  ")]
    assert configured(**yaml.safe_load("\n".join(shown))).data == data
    left = "base_epochs has no effect: training_mode is base_only"
    assert left in data_of(folders, base_epochs=2, **BASE)[1]


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"training_mode": "both", **BOTH}, "'both' is not one of base_only, "),
        (BOTH, "training_mode: None is not one of"),
        ({"training_mode": "hybrid_sequential", **BASE}, "finetuning_paths: is needed"),
        ({"data_dir": "x", **BASE}, "and so does data_dir; drop one"),
        ({"training_mode": "hybrid_interleaved", "base_ratio": 1, **BOTH}, "base_ratio: 1 must"),
        ({"training_mode": "hybrid_interleaved", "mix_strategy": "odd", **BOTH}, "'odd' is not"),
        (
            {
                "training_mode": "hybrid_interleaved",
                "mix_strategy": "alternating",
                "base_ratio": 0.7,
                **BOTH,
            },
            "alternating takes as many of each",
        ),
        ({"base_eval_paths": ["code"], **BASE}, "base_eval_paths: a prepared folder holds its own"),
    ],
)
def test_what_a_mode_cannot_honour_is_refused_with_its_place(folders, keys, said):
    text = fails("E002", data_of, folders, **keys)
    assert said in text and "at " in text


def test_text_is_prepared_on_the_first_start_or_refused_with_the_command(folders, tmp_path):
    raw = folders["raw"]
    cfg = configured(base_paths=[raw], base_eval_paths=raw)
    assert cfg.prepare == {"out": "data/raw", "sources": [raw], "val_sources": [raw]}
    cfg = configured(finetuning_paths=[raw], finetuning_eval_paths=raw)
    assert cfg.prepare == {"out": "data/raw", "sources": [raw], "val_sources": [raw]}
    text = fails("E110", data_of, folders, finetuning_paths=["raw", "web"])
    assert text.startswith(f"at finetuning_paths: {raw} is text, not tokens: python prepare_data.")
    assert "--tokenizer bpe:8192 (conversations: --seq_len 8)" in text
    assert f"or python finetune.py BASE --data {raw}" in text
    both = {"training_mode": "hybrid", "base_paths": ["web"], "finetuning_paths": ["raw"]}
    assert f"--tokenizer {folders['web']}/tokenizer.json" in fails("E110", data_of, folders, **both)
    fails("E110", data_of, folders, base_paths=["raw", "web"])
    fails("E110", configured, base_paths=["/nowhere/x"])
    # nor are what prepare_data.py has begun, or made of several, text by what they also hold
    part = tmp_path / "part"
    part.mkdir()
    (part / "rejected.jsonl").touch()
    (part / "progress.json").touch()
    assert "is not finished" in fails("E110", configured, base_paths=str(part))
    (part / "progress.json").rename(part / "mixture.yaml")
    assert f"data_dir: {part}" in fails("E002", configured, base_paths=str(part))


def test_what_is_typed_beats_the_mode_of_the_file(folders, tmp_path):
    file = tmp_path / "a.yaml"
    keys = {"training_mode": "base_only", "base_paths": [folders["web"]], "model": MODEL}
    file.write_text(json.dumps(keys))
    cfg, _, notes, _ = read_config([str(file), "--data_dir", folders["code"]])
    assert cfg.data_dir == folders["code"] and cfg.data is None
    assert any("data_dir was typed: base_paths" in note for note in notes)
    file.write_text(json.dumps({"data_dir": "x", "model": MODEL}))
    words = ["--training_mode", "base_only", "--base_paths", folders["web"]]
    assert read_config([str(file), *words])[0].data["sources"]["base"]["dir"] == folders["web"]


# ---------------------------------------------------------------- a folder of several datasets


def test_a_folder_with_mixture_yaml_is_opened_as_the_block_in_it(folders, tmp_path):
    block = {"sources": {"web": {"dir": "web", "weight": 0.7}, "sft": {"dir": "sft"}}}
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump({"data": block}))
    cfg = configured(notes := [], data_dir=str(tmp_path))
    data = open_data(cfg)
    assert data.weights == {"web": 0.7, "sft": 1.0} and cfg.data_dir is None
    assert data.sources["web"].path == folders["web"] and "mixture.yaml" in notes[0]
    # what a run writes down opens the same from anywhere
    assert configured(data=cfg.data).data == cfg.data
    for bad in ("data: [", "x: 1", "data: {sources: {a: {weight: 1}}}", "data: {sources: 3}", ""):
        file.write_text(bad)
        assert str(file) in fails("E111", configured, data_dir=str(tmp_path))


# ---------------------------------------------------------------- phases: how long


def phased(*phases, names="ab", **keys) -> Config:
    sources = {name: {"dir": name} for name in names}
    return configured(data={"sources": sources, "phases": list(phases)}, **keys)


A, B, AB = ({"weights": dict.fromkeys(names, 1)} for names in ("a", "b", "ab"))


@pytest.mark.parametrize(
    "phases, max_steps, ends",
    [
        ([A | {"epochs": 2}, B | {"epochs": 1}], None, [20, 25]),
        ([AB | {"epochs": 1}, B | {"tokens": 800}], None, [15, 25]),  # 100 and 50 rows, 10 a step
        ([A | {"until": 7}, B | {"epochs": 0.5}], None, [7, 9]),
        ([A | {"epochs": 0.001}, B | {"until": 30}], None, [1, 30]),  # a step at least
        ([A | {"until": 0.5}, B], 40, [20, 40]),
        ([A | {"epochs": 1}, B], 40, [10, 40]),
        ([A | {"until": 0.5}, B | {"epochs": 1}], 40, [20, 25]),
        ([{"epochs": 1, "weights": {"a": 1, "b": 0}}], None, [10]),
        ([A | {"until": 0.25}, B | {"epochs": 1}, AB], 40, [10, 15, 40]),
    ],
)
def test_phases_end_after_their_epochs_tokens_or_at_their_step(phases, max_steps, ends):
    cfg = phased(*phases)
    assert mixture.sets_length(cfg.data) == (max_steps is None)
    assert phase_ends(cfg, {"a": 100, "b": 50}, 10, max_steps) == ends
    run = {"rows_per_step": 10}
    run["phases"] = resolve_phases(cfg, {"a": 100, "b": 50}, 10, max_steps or ends[-1])
    segments = resolve_order(cfg, {}, None, run)
    assert [row for row, _ in segments] == [0, *(10 * end for end in ends[:-1])]


@pytest.mark.parametrize(
    "phases, said",
    [
        ([A, B], "data.phases[0]: needs until"),
        ([A | {"until": 3, "epochs": 1}, B], "until and epochs all set its length"),
        ([A | {"epochs": 0}, B], "data.phases[0].epochs: 0.0 must be above 0"),
        ([A | {"until": 1, "lr_scale": -1}, B], "lr_scale: -1.0 must not be below 0"),
        ([A | {"warmup_steps": 3}], "data.phases[0].warmup_steps: the run's own"),
        ([A | {"until": 9}, {"weights": {"c": 1}}], "with names of a, b"),
        ([A | {"until": 9}, {"weights": {"a": 0}}], "none below 0, not all 0"),
    ],
)
def test_impossible_phases_are_refused(phases, said):
    assert said in fails("E002", phased, *phases)


def test_a_phase_that_would_end_before_it_begins_is_refused():
    cfg = phased(A | {"epochs": 2}, B | {"until": 5})
    assert "ends at step 5, before it begins at step 20" in fails(
        "E002", phase_ends, cfg, {"a": 100, "b": 50}, 10, None
    )


# ---------------------------------------------------------------- phases: at what rate


def run_of(n, phases=(), warmup=10):
    return SimpleNamespace(max_steps=n, min_lr=0.1, warmup_steps=warmup, phases=list(phases))


def phase(step, lr_scale=1.0, warmup_steps=None, name=None):
    return {"step": step, "lr_scale": lr_scale, "warmup_steps": warmup_steps, "name": name}


@pytest.mark.parametrize("schedule", RANGES["lr_schedule"].split(" | "))
@few
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 40), st.floats(0.01, 2))
def test_a_phase_that_warms_up_anew_is_a_run_of_its_own(schedule, first, second, warmup, scale):
    cfg = Config(data_dir="x", lr_schedule=schedule, learning_rate=1.0)
    run = run_of(first + second, [phase(0), phase(first, scale, warmup)])
    before = [lr_at(cfg, run_of(first), step) for step in range(first)]
    after = [scale * lr_at(cfg, run_of(second, warmup=warmup), s) for s in range(second + 1)]
    assert [lr_at(cfg, run, step) for step in range(first + second + 1)] == before + after


def test_a_phase_without_a_warm_up_only_scales_the_schedule():
    cfg = Config(data_dir="x", lr_schedule="cosine", learning_rate=1.0)
    plain, run = run_of(100), run_of(100, [phase(0, 0.5), phase(40), phase(70, 0.1)])
    factor = [0.5] * 40 + [1.0] * 30 + [0.1] * 30
    rates = [lr_at(cfg, run, step) for step in range(100)]
    assert rates == [f * lr_at(cfg, plain, step) for step, f in enumerate(factor)]


def test_the_start_block_says_when_of_what_how_often_and_at_what_rate():
    run = run_of(30, [phase(0, name="base"), phase(20, 0.1, 5)])
    run.rows_per_step = 10
    run.segments = [[0, {"a": 3.0, "b": 1.0}], [200, {"b": 1.0}], [300, {"a": 1.0}]]
    sources = {"a": SimpleNamespace(windows=100), "b": SimpleNamespace(windows=20)}
    assert mixture_lines(run, sources) == [
        "mixture    base from step 0: a 75.0 % (1.50 epochs), b 25.0 % (2.50 epochs)",
        "mixture    data from step 20: b 100.0 % (5.00 epochs); learning rate x 0.1; "
        "the schedule begins anew with 5 warm-up steps",
        "mixture    data from step 30: a 100.0 % (0.00 epochs)",
        "advice     the run ends before that begins: raise max_steps",
        "advice     b is read 7.5 times; beyond 4 epochs repeats fade: give it less weight, or add "
        "data",
    ]
    run.segments = run.segments[:1]
    assert mixture_lines(run, {"a": sources["a"]}) == []


@pytest.mark.parametrize("step, ends", [(19, False), (20, True)])
def test_no_forecast_ends_a_run_whose_next_phase_is_to_come(step, ends, monkeypatch):
    monkeypatch.setattr(forecast, "reason_to_end", lambda trainer: "stop: for the test")
    heard = []
    trainer = SimpleNamespace(step=step, run=run_of(40, [phase(0), phase(20)]))
    trainer.cfg, trainer.fine_tunes = SimpleNamespace(enable_early_stopping=False), False
    trainer.orchestrator = SimpleNamespace(end_early=heard.append)
    forecast.advise(trainer)
    assert bool(heard) == ends


# ---------------------------------------------------------------- weights that change on the way


WEIGHTS = st.dictionaries(st.sampled_from("abc"), st.integers(1, 9), min_size=1)
STARTS = st.lists(st.tuples(st.integers(1, 3000), WEIGHTS), min_size=1, max_size=4)


@few
@given(STARTS, st.integers(0, 99))
def test_weights_that_change_from_resume_to_resume_repeat_and_skip_nothing(starts, seed):
    check_every_epoch(starts, seed)


@pytest.mark.nightly
@settings(max_examples=500, deadline=None)
@given(STARTS, st.integers(0, 2**40))
def test_weights_that_change_many_times(starts, seed):
    check_every_epoch(starts, seed)


def check_every_epoch(starts, seed):
    """A source may also come or go. What was read stays read, and each epoch of each source is a
    permutation of its windows."""
    held = {"a": 701, "b": 97, "c": 5}
    seen = collections.defaultdict(list)
    saved, cursor = None, 0
    for rows, weights in starts:
        sources = {name: {"dir": name, "weight": w} for name, w in weights.items()}
        cfg = configured(data={"sources": sources})
        run = {"rows_per_step": 1, "phases": []}
        segments = resolve_order(cfg, mixture.weights_of(cfg.data), saved, run)
        load = Loader({k: SimpleNamespace(windows=held[k]) for k in weights}, seed, segments)
        for row in range(cursor, cursor + rows):
            name, window, epoch = load.locate(row)
            assert name in weights
            seen[name].append((epoch, window))
        cursor += rows
        assert load.rows(cursor) == {name: len(seen[name]) for name in weights}
        saved = {"run": {"segments": segments}, "cursor": cursor}
    for name, places in seen.items():
        n = held[name]
        assert [epoch for epoch, _ in places] == [i // n for i in range(len(places))]
        for i in range(0, len(places), n):
            part = places[i : i + n]
            assert len(set(part)) == len(part)


# ---------------------------------------------------------------- buckets


def test_weights_of_a_source_are_those_of_its_buckets_and_back():
    sources = {"a": {"buckets": 4}, "b": {}}
    assert mixture.leaves("a", sources["a"]) == ["a.1", "a.2", "a.3", "a.4"]
    weights = mixture.spread(sources, {"a": 2, "a.2": 1, "b": 1})
    assert weights == {"a.1": 0.5, "a.2": 1.5, "a.3": 0.5, "a.4": 0.5, "b": 1.0}
    assert mixture.whole(sources, weights) == {"a": 3.0, "b": 1.0}


@few
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 9), st.integers(0, 9))
def test_the_difficulty_of_a_window_is_the_mean_over_its_tokens(lengths, T, seed):
    begins = np.concatenate([[0], np.cumsum(lengths)])
    values = np.random.default_rng(seed).integers(-9, 9, len(lengths))
    of_token = np.repeat(values, lengths)
    starts = np.arange(0, max(0, len(of_token) - T))
    expected = [of_token[at : at + T].mean() for at in starts]
    assert np.allclose(buckets.window_means(begins, values, starts, T), expected)


def opened(path, T=8, split="train") -> Source:
    return Source(str(path), split, T, 0.0)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_buckets_share_the_windows_out_from_easy_to_hard(tmp_path, n):
    lengths = np.random.default_rng(1).integers(2, 200, 60).tolist()
    source = opened(prepared(tmp_path / "a", lengths))
    scores = buckets.window_scores(source, "length")
    parts = buckets.cut(source, n)
    numbers = [part.numbers for part in parts]
    assert sorted(np.concatenate(numbers).tolist()) == list(range(source.windows))
    assert max(map(len, numbers)) - min(map(len, numbers)) <= 1
    for easy, hard in zip(numbers, numbers[1:]):
        assert scores[easy].max() <= scores[hard].min()
    assert np.array_equal(parts[1].window(3), source.window(int(numbers[1][3])))
    assert (parts[0].path, parts[0].seq_len) == (source.path, 8)
    # a score for each document, the other way round: another order, and other data to a checkpoint
    np.save(tmp_path / "score.npy", -np.array(lengths, np.float32))
    turned = buckets.cut(source, n, str(tmp_path / "score.npy"))
    assert np.allclose(buckets.window_scores(source, str(tmp_path / "score.npy")), -scores)
    assert len({part.fingerprint for part in parts + turned}) == 2 * n
    assert [p.fingerprint for p in buckets.cut(source, n)] == [p.fingerprint for p in parts]


def test_windows_of_packed_rows_begin_where_rows_do(tmp_path):
    source = opened(prepared(tmp_path / "a", [90], kind="chat", rows={"length": 9}))
    assert buckets.window_starts(source).tolist() == list(range(0, 90, 9))


def test_numbers_that_cannot_be_a_difficulty_are_refused(tmp_path):
    source = opened(prepared(tmp_path / "a", [50, 50]))
    file = str(tmp_path / "s.npy")
    fails("E110", buckets.cut, source, 2, file)
    for bad, code in (
        (np.zeros((2, 1)), "E112"),
        (np.array(["a", "b"]), "E112"),
        (np.array([0.0, np.nan]), "E112"),
        (np.zeros(3), "E113"),
    ):
        np.save(file, bad)
        assert file in fails(code, buckets.cut, source, 2, file)
    np.save(file, np.array([{}, None]), allow_pickle=True)
    fails("E112", buckets.cut, source, 2, file)
    text = fails("E110", buckets.cut, source, 2, "loss")
    assert f"python -m lumen.difficulty RUN {source.path} --max_seq_len 8" in text
    fails("E114", buckets.cut, source, source.windows + 1)
    np.save(tmp_path / "a" / "train_00000.docs.npy", np.array([0, 7, 99], np.uint64))
    fails("E111", buckets.cut, source, 2)
    os.remove(tmp_path / "a" / "train_00000.docs.npy")
    assert "difficulty: loss needs none" in fails("E110", buckets.cut, source, 2)


# ---------------------------------------------------------------- curriculum


def curriculum(a, n=3, **more) -> Config:
    sources = {"t": {"dir": "t", "buckets": n, "weight": 3}, "u": {"dir": "u"}}
    return configured(data={"sources": sources, "curriculum": a, **more})


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("a", [0, 0.25, 1])
def test_a_curriculum_moves_windows_in_time_and_adds_none(a, n):
    phases = mixture.phases_of(curriculum(a, n).data)
    assert [round(phase.get("until", 1) * n) for phase in phases] == list(range(1, n + 1))
    shares = np.array([[p["weights"][f"t.{k + 1}"] for k in range(n)] for p in phases]) / 3
    assert np.allclose(shares.sum(0), 1, atol=1e-4) and np.allclose(shares.sum(1), 1, atol=1e-4)
    assert np.allclose(shares, (1 - a) / n + a * np.eye(n), atol=1e-5)
    assert {p["weights"]["u"] for p in phases} == {1.0}


def test_a_whole_curriculum_reads_every_window_once(tmp_path):
    """Strictly easy to hard over one epoch, as a run of 3 x 1,024 rows."""
    rng = np.random.default_rng(2)
    source = opened(prepared(tmp_path / "a", rng.integers(2, 200, 300).tolist()))
    source.windows = 3 * BLOCK  # of a few more
    sources = {"t": {"dir": "t", "buckets": 3}}
    cfg = configured(data={"sources": sources, "curriculum": 1})
    parts = dict(zip(mixture.leaves("t", sources["t"]), buckets.cut(source, 3)))
    run = {"rows_per_step": 1, "phases": resolve_phases(cfg, {}, 1, 3 * BLOCK)}
    load = Loader(parts, 1, resolve_order(cfg, {}, None, run))
    places = [load.locate(row) for row in range(3 * BLOCK)]
    assert [name for name, _, _ in places] == np.repeat(["t.1", "t.2", "t.3"], BLOCK).tolist()
    read = [int(parts[name].numbers[i]) for name, i, _ in places]
    assert sorted(read) == list(range(3 * BLOCK)) and read[:BLOCK] != sorted(read[:BLOCK])


def test_an_impossible_curriculum_is_refused():
    assert "must be in [0, 1]" in fails("E002", curriculum, 1.5)
    assert "write the weights of buckets" in fails(
        "E002", curriculum, 0.5, phases=[{"weights": {"u": 1}}]
    )
    assert "needs sources with buckets" in fails("E002", curriculum, 0.5, 1)
    for spec, said in (
        ({"buckets": 0}, "must be in [1, 64]"),
        ({"buckets": 2, "difficulty": "odd"}, "odd is not length, loss, or a FILE.npy"),
        ({"difficulty": "loss"}, "needs buckets: N"),
    ):
        data = {"sources": {"t": {"dir": "t", **spec}}}
        assert said in fails("E002", configured, data=data)
    twice = {"t": {"dir": "t", "buckets": 2}, "t.1": {"dir": "u"}}
    assert "t.1 is a source and a bucket" in fails("E002", configured, data={"sources": twice})


def test_the_reference_systems_key_is_a_curriculum_over_buckets():
    cfg = configured(data_dir="x", curriculum_aggressiveness="0.5")
    assert cfg.data["sources"] == {"data": {"dir": "x", "buckets": 3, "difficulty": "length"}}
    assert len(cfg.data["phases"]) == 3 and cfg.data_dir is None
    assert configured(data_dir="x", curriculum_aggressiveness=0).data is None
    keys = {"prepare": {"sources": ["x"]}, "curriculum_aggressiveness": 1}
    assert "make it first" in fails("E002", configured, **keys)


# ---------------------------------------------------------------- opened


def test_open_data_makes_a_source_of_each_bucket_and_one_to_evaluate(tmp_path):
    folder = prepared(tmp_path / "a", [40] * 30)
    np.save(tmp_path / "bare.npy", np.zeros(2000, np.uint16))
    sources = {"t": {"dir": folder, "buckets": 2, "weight": 4}, "u": {"dir": "bare.npy"}}
    sources["u"]["dir"] = str(tmp_path / "bare.npy")
    data = open_data(configured(data={"sources": sources}))
    assert list(data.sources) == ["t.1", "t.2", "u"]
    assert data.weights == {"t.1": 2.0, "t.2": 2.0, "u": 1.0}
    assert set(data.val_sources) == {"u"} and data.tokenizer_sum == "t"
    # the start block speaks of whole sources: what is held out is not cut
    said = lines.data_lines(data.sources, data.val_sources)
    assert [line.split()[1] for line in said] == ["t:", "u:"] and "1,200 train tokens" in said[0]
    advice = lines.validation_advice(Config(data_dir="x"), data.sources, data.val_sources)
    assert advice[0] == "no validation in t: val_loss is of the others alone"
    assert data.windows == opened(folder).windows + data.sources["u"].windows


def test_preference_pairs_are_no_data_of_this_command(tmp_path):
    folder = prepared(tmp_path / "a", [90], kind="pairs")
    assert "preference pairs" in fails("E124", open_data, configured(data_dir=folder))
    folder = prepared(tmp_path / "b", [90], kind="text")
    assert open_data(configured(data_dir=folder)).windows


def test_validation_rows_follow_the_weights_that_the_run_ends_with():
    """Sources without val are left out; those of earlier phases are told, and count for nothing."""
    val = {name: SimpleNamespace(windows=400, sides=1) for name in ("a", "b", "t")}
    specs = {"a": {}, "b": {}, "none": {}, "t": {"buckets": 2}}
    data = Data({}, 64, val_sources=val, specs=specs)
    cfg = configured(data_dir="x", eval_tokens=800)  # 100 rows
    segments = [[0, {"a": 1.0, "t.1": 1.0}], [9, {"b": 1.0, "none": 2.0, "t.1": 1, "t.2": 2}]]
    counted, aside = choose_val_rows(data, cfg, segments)
    assert collections.Counter(name for name, _ in counted) == {"b": 25, "t": 75}
    assert aside == [("a", i) for i in range(25)]
    counted, aside = choose_val_rows(data, cfg, [[0, {"a": 1.0, "b": 1.0, "t.2": 2.0}]])
    assert collections.Counter(name for name, _ in counted) == {"a": 25, "b": 25, "t": 50}
    assert aside == []
    counted, aside = choose_val_rows(data, cfg, [[0, {"a": 1.0}], [9, {"none": 1.0}]])
    assert {name for name, _ in counted} == {"a", "b", "t"} and aside == []


# ---------------------------------------------------------------- what changed

MANIFEST = {
    "tokenizer": {"sha256": "t"},
    "template": {"text": "chatml"},
    "rows": {"length": 9},
    "loss_on": "assistant",
    "settings": {"seed": 1},
    "splits": {"train": {"shards": [1]}, "val": {"shards": [2]}},
}


@pytest.mark.parametrize(
    "block, words",
    [
        ("tokenizer", "the tokenizer"),
        ("template", "the chat template"),
        ("rows", "the length of rows"),
        ("loss_on", "what of a conversation is learned (loss_on)"),
        ("settings", "the settings of prepare_data.py"),
        ("splits.train", "the training shards"),
        ("splits.val", "the val split"),
    ],
)
def test_what_has_changed_in_the_data_has_a_name(block, words):
    other = json.loads(json.dumps(MANIFEST))
    *above, name = block.split(".")
    (other[above[0]] if above else other)[name] = "other"
    assert what_changed(facts_of(MANIFEST), facts_of(other)) == f"has changed: {words}"
    assert what_changed(facts_of(MANIFEST), facts_of(MANIFEST)) == "has changed: its sources"
    del other[above[0] if above else name]
    assert words in what_changed(facts_of(MANIFEST), facts_of(other))
    assert what_changed({}, facts_of(MANIFEST)).startswith("holds other shards")
    assert what_changed(None, {}) == "is new" and what_changed({}, None) == "is gone"
