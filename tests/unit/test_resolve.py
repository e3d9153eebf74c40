"""resolve() on tables: what auto and null become, with no Trainer, no data and no process."""

import dataclasses

import pytest
import torch
import yaml

from lumen import plan, schedule
from lumen import resolve as resolving
from lumen.config import Config, build_config
from lumen.differences import compare, other_bits
from lumen.errors import UserError
from lumen.lines import config_yaml
from lumen.machine import Machine
from lumen.optim import Muon
from lumen.resolve import (
    Facts,
    Findings,
    Kept,
    read_hint,
    resolve,
    resolve_batch,
    resolve_length,
    resolved,
    with_length,
    with_rate,
    write_hint,
)
from lumen.schedule import auto_rows, enough_steps, resolve_order, resolve_phases
from model import ModelConfig

T = 32
MODEL = {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": T}
CPU = Machine(torch.device("cpu"), "a CPU", "fp32", None)


def configured(**keys):
    """-> (Config, the keys as written)"""
    written = {"data_dir": "x", "model": dict(MODEL), **keys}
    return build_config(written, lambda key: "test", []), written


def facts_of(cfg, written, ranks=1, windows=1000, **known) -> Facts:
    known = {"memory": 1e12, "machine": CPU, "weights": {"data": 1.0}} | known
    model, layout = plan.on_meta(cfg.model), plan.Layout(ranks)
    return Facts(written, ranks, layout, windows, model=model, **known)


def state_of(run, cfg, written, **more) -> dict:
    """The state.json of a run, as far as resolve() reads it."""
    config = resolved(cfg, run)
    state = {"run": dataclasses.asdict(run), "written": written, "config": config, "cursor": 0}
    return state | more


def batch(ranks=1, saved=None, found=None, **keys):
    """-> (rows_per_step, micro_batch, accumulation)"""
    cfg, written = configured(**keys)
    kept = Kept(saved, written, "cpu")
    size = resolve_batch(cfg, facts_of(cfg, written, ranks), kept, found or Findings())
    return size["rows_per_step"], size["micro_batch"], size["accumulation"]


def length(windows=1000, rows=10, found=None, **keys) -> dict:
    cfg, written = configured(**keys)
    facts = facts_of(cfg, written, windows=windows)
    return resolve_length(cfg, facts, Kept(None, written, "cpu"), rows, found or Findings())


def test_a_default_that_has_changed_since_does_not_change_a_run_that_goes_on():
    cfg, written = configured(max_steps=100)
    facts = facts_of(cfg, written)
    now = resolve(cfg, facts, None, Findings())
    then = dataclasses.replace(now, learning_rate=3e-4, min_lr=3e-4 / 10)
    then = dataclasses.replace(then, warmup_steps=5, peak_step=5)
    assert now != then, "a rate and a warm-up of older versions"
    assert resolve(cfg, facts, state_of(then, cfg, written), Findings()) == then


# ---------------------------------------------------------------- batch


@pytest.mark.parametrize(
    "keys, ranks, expected",
    [
        ({"batch_size": 4}, 1, (4, 4, 1)),
        ({"batch_size": 4, "gradient_accumulation_steps": 3}, 1, (12, 4, 3)),
        ({"batch_size": 4, "gradient_accumulation_steps": 3}, 2, (24, 4, 3)),
        ({"batch_size": 4, "batch_tokens": 24 * T}, 1, (24, 4, 6)),
        ({"batch_size": 4, "batch_tokens": 24 * T}, 2, (24, 4, 3)),
        ({"batch_size": 4, "batch_tokens": 24 * T}, 3, (24, 4, 2)),
        ({"batch_size": 5, "batch_tokens": 24 * T}, 1, (24, 4, 6)),  # the next that divides
        ({"batch_size": 50, "batch_tokens": 24 * T}, 1, (24, 24, 1)),
        ({"batch_size": "auto", "batch_tokens": 24 * T}, 2, (24, 12, 1)),
    ],
)
def test_the_rows_of_a_step_are_shared_by_ranks_and_micro_steps(keys, ranks, expected):
    assert batch(ranks, **keys) == expected


def test_keys_of_sharding_are_noted_where_they_ask_for_something():
    """A run's own config.yaml has them all, at their defaults."""
    own = dataclasses.asdict(Config())
    assert resolving.without_effect(Config(), own) == []
    for key, value, said in (("expert_parallel", 2, 1), ("zero_stage", 0, 0)):
        notes = resolving.without_effect(Config(**{key: value}), own | {key: value})
        assert len(notes) == said and all(f"{key}: takes effect" in note for note in notes)


def test_a_micro_batch_that_does_not_divide_is_said_to_be_smaller():
    found = Findings()
    assert batch(2, found=found, batch_size=16, batch_tokens=24 * T) == (24, 12, 1)
    assert found.changes == ["batch_size: 16 does not fit 24 rows on 2 ranks: 12"]


@pytest.mark.parametrize("ranks, nearest", [(2, 24 * 2 * T), (3, 16 * 3 * T)])
def test_batch_tokens_that_cannot_be_shared_name_the_nearest_that_can(ranks, nearest):
    with pytest.raises(UserError, match=f"E002.*not a multiple.*nearest that is: {nearest}"):
        batch(ranks, batch_tokens=48 * T + 1)


def test_two_sizes_of_the_batch_that_contradict_each_other_are_refused():
    keys = {"batch_tokens": 24 * T, "batch_size": 4, "gradient_accumulation_steps": 5}
    with pytest.raises(UserError, match="E002: batch_tokens is 24 rows, .* processes 20: drop one"):
        batch(**keys)
    assert batch(**keys | {"gradient_accumulation_steps": 6}) == (24, 4, 6)


def saved_run(ranks=1, **keys) -> dict:
    cfg, written = configured(**keys)
    run = resolve(cfg, facts_of(cfg, written, ranks), None, Findings())
    return state_of(run, cfg, written)


@pytest.mark.parametrize("ranks, expected", [(1, (24, 4, 6)), (2, (24, 4, 3)), (3, (24, 4, 2))])
def test_rows_per_step_are_kept_on_resume_whatever_the_number_of_ranks(ranks, expected):
    keys = {"batch_size": 4, "gradient_accumulation_steps": 6, "max_steps": 9}
    assert batch(ranks, saved_run(**keys), **keys) == expected


def test_rows_that_another_number_of_ranks_cannot_share_are_refused_with_what_can():
    keys = {"batch_size": 4, "gradient_accumulation_steps": 6, "max_steps": 9}
    with pytest.raises(UserError, match=r"E600: 24 rows .* 5 processes; can: \[4, 6\]"):
        batch(5, saved_run(**keys), **keys)


def test_what_the_user_writes_otherwise_now_is_not_kept():
    keys = {"batch_size": 4, "gradient_accumulation_steps": 6, "max_steps": 9}
    saved = saved_run(**keys)
    assert batch(1, saved, **keys | {"gradient_accumulation_steps": 2}) == (8, 4, 2)


def test_auto_takes_what_fits_and_says_so():
    cfg, written = configured(batch_size="auto", batch_tokens=24 * T)
    sizes, found = {}, Findings()
    for n in (1, 2, 3, 4, 6, 8, 12, 24):
        how = (n, 24 // n, "fp32", "none", plan.IMBALANCE)
        model = plan.on_meta(cfg.model)
        sizes[n] = plan.rank_memory(model, plan.Layout(1), *how)["total"]
    facts = facts_of(cfg, written, memory=sizes[6] / cfg.target_memory + 1)
    size = resolve_batch(cfg, facts, Kept(None, written, "cpu"), found)
    assert size["micro_batch"] == 6
    assert found.estimated and found.hint.startswith("batch_size: auto is 6: about ")


N = 30_848  # parameters of the model above
ONE_PASS = 100_000  # rows


def rows_by_rule(windows=1000, ranks=1, found=None, **keys) -> int:
    """Of a step, for `batch_size: auto` alone."""
    cfg, written = configured(batch_size="auto", **keys)
    held = {"a": 60_000, "b": 40_000}
    facts = facts_of(cfg, written, ranks, windows=windows, held=held)
    size = resolve_batch(cfg, facts, Kept(None, written, "cpu"), found or Findings())
    return size["rows_per_step"]


def laws_best(rows: float) -> float:
    """Rows of Step Law's best batch for a run that reads so many (Li et al. 2025, 2503.04715)."""
    return 0.58 * (rows * T) ** 0.571 / T


@pytest.mark.parametrize(
    "keys, rows",
    [
        ({}, ONE_PASS),
        ({"num_epochs": 40}, 40 * ONE_PASS),
        ({"tokens_per_parameter": 500, "num_epochs": 1}, ONE_PASS),  # at most so many passes
        ({"tokens_per_parameter": 20}, 20 * N / T),
        ({"max_steps": 3}, 20 * N / T),
        ({"max_steps": 3_000_000}, 20 * N / T),
        ({"data": {"phases": [{"tokens": 5000 * T, "weights": {"a": 1}}]}}, 5000),
        ({"data": {"phases": [{"epochs": 7, "weights": {"a": 1, "b": 1}}]}}, 7 * ONE_PASS),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_auto_alone_takes_step_laws_batch_for_what_the_run_reads(keys, rows, ranks):
    sources = {name: {"dir": "d", "weight": 1} for name in "ab"}
    assert plan.on_meta(ModelConfig(**MODEL)).n_params()["active"] == N
    if "data" in keys:
        keys = {"data": keys["data"] | {"sources": sources}, "data_dir": None}
    found = rows_by_rule(ONE_PASS, ranks, **keys)
    assert found % ranks == 0
    # the nearest of 1, 2, 3, 4, 6, 8 ... is at most the root of 1.5 away; one row is the least
    assert found == ranks or 1.5**-0.501 < found / laws_best(rows) < 1.5**0.501


def test_the_rule_for_a_batch_is_the_quickstarts_trial():
    """1.8 M tokens at T = 256: 2,048 was better than 1,024 and than 4,096."""
    cfg, written = configured(batch_size="auto", model=MODEL | {"max_seq_len": 256})
    rows, why = auto_rows(cfg, facts_of(cfg, written, windows=7031), 1_066_624)
    assert rows == 8 and "2,048 tokens a step" in why and "tokens: 1 x the data" in why
    assert "for D = 1,799,936 tokens" in why and "gradient_accumulation_steps" not in why


def test_auto_alone_is_said_kept_and_written_down():
    found = Findings()
    cfg, written = configured(batch_size="auto", gradient_accumulation_steps=4, num_epochs=2)
    facts = facts_of(cfg, written, windows=8000)
    run = resolve(cfg, facts, None, found)
    (line,) = [text for text in found.changes if text.startswith("batch_size auto")]
    assert "Step Law" in line and "gradient_accumulation_steps follows from it" in line
    assert run.rows_per_step == run.micro_batch * run.accumulation == rows_by_rule(16000)
    # longer, on more data, on other ranks: a step stays what it was
    longer, now = configured(batch_size="auto", gradient_accumulation_steps=4, num_epochs=9)
    saved, again = state_of(run, cfg, written), Findings()
    on = resolve(longer, facts_of(longer, now, 2, windows=99999), saved, again)
    assert on.rows_per_step == run.rows_per_step and on.learning_rate == run.learning_rate
    assert not [text for text in again.changes if text.startswith("batch_size auto")]
    # config.yaml repeats it
    keys = yaml.safe_load(config_yaml(with_rate(cfg, run), run))
    assert keys["batch_tokens"] == run.rows_per_step * T and keys["batch_size"] == run.micro_batch
    cfg, written = configured(**{k: v for k, v in keys.items() if k != "model"})
    assert resolve(cfg, facts_of(cfg, written, windows=8000), None, Findings()) == run


def test_auto_alone_needs_data_to_go_by():
    with pytest.raises(UserError, match="E002: batch_size: auto .* not prepared yet; give batch_t"):
        rows_by_rule(windows=None, max_steps=10)


def test_a_hint_of_an_earlier_start_makes_the_micro_batch_smaller(tmp_path):
    write_hint(tmp_path, 0, {"micro_batch": 2, "written": 4})
    assert read_hint(tmp_path, 4, CPU) == 2
    assert read_hint(tmp_path, 8, CPU) is None, "the user has changed the size"
    write_hint(tmp_path, 0, {"micro_batch": 2, "written": 4, "device": ["NVIDIA H100", 80]})
    assert read_hint(tmp_path, 4, CPU) is None, "another device has another limit"
    cfg, written = configured(batch_size=4, gradient_accumulation_steps=3)
    facts, found = facts_of(cfg, written, hint=2), Findings()
    size = resolve_batch(cfg, facts, Kept(None, written, "cpu"), found)
    assert (size["rows_per_step"], size["micro_batch"], size["accumulation"]) == (12, 2, 6)
    assert "batch_size: 2, since a larger one ran out of memory" in found.hint


# ---------------------------------------------------------------- length and schedule


@pytest.mark.parametrize(
    "keys, steps",
    [
        ({}, 100),
        ({"num_epochs": 2.5}, 250),
        ({"num_epochs": 0}, 0),
        ({"max_steps": 7}, 7),
        ({"max_steps": 0}, 0),
    ],
)
def test_the_length_follows_from_passes_over_the_data(keys, steps):
    assert length(**keys)["max_steps"] == steps


def test_data_that_are_less_than_a_step_are_refused_unless_no_step_was_asked_for():
    for windows in (0, 9):
        with pytest.raises(UserError, match=f"E114: {windows} rows of {T} tokens are less than"):
            length(windows=windows)
    assert length(windows=9, num_epochs=0)["max_steps"] == 0
    assert length(windows=None)["max_steps"] == 0, "not known yet: a dry run before prepare"


def test_tokens_per_parameter_sets_the_length_within_its_passes():
    found = Findings()
    keys = {"tokens_per_parameter": 20, "learning_rate": 1e-3}
    assert length(found=found, **keys)["max_steps"] > 100
    assert length(tokens_per_parameter=20, num_epochs=2)["max_steps"] == 200, "at most two passes"
    assert len(found.changes) == 1


@pytest.mark.parametrize(
    "keys, warmup, peak",
    [
        ({"max_steps": 100}, 10, 10),  # a tenth
        ({"max_steps": 100_000}, 2000, 2000),
        ({"max_steps": 100, "warmup_steps": 0}, 0, 0),
        ({"max_steps": 100, "warmup_steps": 0.1}, 10, 10),
        ({"max_steps": 100, "warmup_steps": 1}, 1, 1),
        ({"max_steps": 100, "warmup_steps": 7.0}, 7, 7),
        ({"max_steps": 100, "lr_schedule": "onecycle"}, 10, 30),
        ({"max_steps": 1, "lr_schedule": "onecycle"}, 0, 1),
    ],
)
def test_warm_up_in_steps_and_in_fractions(keys, warmup, peak):
    found = length(**keys)
    assert (found["warmup_steps"], found["peak_step"]) == (warmup, peak)


def test_the_lowest_rate_is_a_tenth_unless_it_is_written():
    assert length(learning_rate=0.5)["min_lr"] == 0.05
    assert length(learning_rate=0.5, min_lr=0.0)["min_lr"] == 0.0


def test_the_rate_by_model_and_batch():
    """At the quickstart's size the rate that was found best there; by the square root of the batch;
    lower for more parameters, of experts by those that work; its reason is said."""
    sizes = dict(vocab_size=2048, d_model=128, n_layers=4, n_heads=2, d_ff=352, max_seq_len=256)
    rate, why = schedule.auto_rate(plan.on_meta(ModelConfig(**sizes)), 2048)
    best = schedule.BEST_RATE
    assert rate == best and "0.804 M" in why and "2,048" in why
    muon, why = schedule.auto_rate(plan.on_meta(ModelConfig(**sizes)), 2048, "muon")
    assert muon == pytest.approx(Muon.RATE * best, rel=0.01) and f"{muon:g}" in why
    rates = [schedule.auto_rate(plan.on_meta(ModelConfig(**sizes)), n)[0] for n in (512, 128)]
    assert rates == pytest.approx([best / 2, best / 4], rel=0.03)
    wide = sizes | dict(d_model=256, d_ff=704)
    lower, _ = schedule.auto_rate(plan.on_meta(ModelConfig(**wide)), 2048)
    assert lower == pytest.approx(best * 4**-0.713, rel=0.03)
    experts = dict(n_experts=8, d_expert=176, moe_every=1)  # two of them are as wide as the FFN
    active, _ = schedule.auto_rate(plan.on_meta(ModelConfig(**sizes | experts)), 2048)
    assert active == pytest.approx(best, rel=0.02)
    tiny = plan.on_meta(ModelConfig(**MODEL))
    assert schedule.auto_rate(tiny, 1 << 20)[0] == schedule.LARGEST_RATE
    most, _ = schedule.auto_rate(tiny, 1 << 20, "muon")
    assert most == pytest.approx(Muon.RATE * schedule.LARGEST_RATE, rel=0.02)


def test_an_automatic_rate_is_resolved_once_and_a_number_never(monkeypatch):
    monkeypatch.setattr(schedule, "LARGEST_RATE", 1.0)  # or a model this small always had that
    found = Findings()
    cfg, written = configured(max_steps=9, batch_size=4)
    assert cfg.learning_rate == "auto", "what a run has that names no rate"
    facts = facts_of(cfg, written)
    run = resolve(cfg, facts, None, found)
    want, why = schedule.auto_rate(facts.model, 4 * T)
    assert (run.learning_rate, run.min_lr) == (want, want / 10) and found.changes == [why]
    assert with_rate(cfg, run) == dataclasses.replace(cfg, learning_rate=want)
    state = state_of(run, with_rate(cfg, run), written)
    # kept, without a word, although the rule has another constant by now
    state["run"]["learning_rate"] = 0.007
    again = Findings()
    assert resolve(cfg, facts, state, again).learning_rate == 0.007 and not again.changes
    # another batch size: by its square root
    other = configured(max_steps=9, learning_rate="auto", batch_size=1)
    run = resolve(other[0], facts_of(*other), state, again)
    assert run.learning_rate == pytest.approx(want / 2, rel=0.02)
    number = configured(max_steps=9, learning_rate=0.01)
    assert resolve(number[0], facts_of(*number), state, Findings()).learning_rate == 0.01


def test_another_length_is_one_fact():
    """A replay that cut max_steps and was resumed went on to the old length: it stood twice."""
    cfg, written = configured(max_steps=100, lr_schedule="onecycle", warmup_steps=5)
    facts = facts_of(cfg, written)
    run = with_length(cfg, resolve(cfg, facts, None, Findings()), 50)
    assert (run.max_steps, run.peak_step) == (50, 15)
    state = state_of(run, cfg, written)
    assert resolve(cfg, facts, state, Findings()) == run, "and is kept"
    assert state["config"]["max_steps"] == 50


# ---------------------------------------------------------------- machine


def test_what_suited_another_kind_of_device_is_not_kept():
    cfg, written = configured(max_steps=9, compile_model="auto")
    facts = facts_of(cfg, written)
    run = resolve(cfg, facts, None, Findings())
    assert (run.device, run.deterministic, run.compile_model) == ("cpu", True, False)
    there = {"device": "cuda", "deterministic": False, "compile_model": True}
    gpu = state_of(dataclasses.replace(run, **there), cfg, written)
    assert resolve(cfg, facts, gpu, Findings()) == run
    here = state_of(dataclasses.replace(run, deterministic=False), cfg, written)
    assert resolve(cfg, facts, here, Findings()).deterministic is False


@pytest.mark.parametrize("deterministic", [True, False])
def test_backends_are_timed_as_the_run_will_compute(deterministic, monkeypatch):
    """Triton tunes its tiles in a run that is not deterministic only: auto timed tuned ones."""
    found = []

    def pick(choice, *where):
        found.append(torch.are_deterministic_algorithms_enabled())
        return "slices", "as asked"

    monkeypatch.setattr(resolving, "pick_backend", pick)
    torch.use_deterministic_algorithms(not deterministic)
    model = dict(MODEL, n_experts=4)
    try:
        cfg, written = configured(max_steps=9, deterministic=deterministic, model=model)
        resolve(cfg, facts_of(cfg, written), None, Findings())
        assert torch.are_deterministic_algorithms_enabled() is not deterministic, "as it was"
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == [deterministic]


def test_what_cannot_fit_is_refused_and_in_a_dry_run_said():
    cfg, written = configured(max_steps=9)
    facts = facts_of(cfg, written, memory=1e5)
    with pytest.raises(UserError, match="E200"):
        resolve(cfg, facts, None, Findings())
    facts.dry_run, found = True, Findings()
    resolve(cfg, facts, None, found)
    assert found.misfit.startswith("this will not fit: ")


# ---------------------------------------------------------------- the order of data

PHASES = [{"until": 0.5, "weights": {"a": 1.0}}, {"weights": {"a": 1.0, "b": 2.0}}]
SEGMENTS = [[0, {"a": 1.0}], [50, {"a": 1.0, "b": 2.0}]]


def order(phases, saved=None, names="ab", **more) -> list:
    sources = {name: {"dir": name, "weight": 1.0} for name in names}
    data = {"sources": sources} | ({"phases": phases} if phases else {})
    cfg, written = configured(data_dir=None, data=data)
    facts = facts_of(cfg, written, weights=dict.fromkeys(names, 1.0))
    state = {"run": {"segments": saved}, **more} if saved else None
    run = {"rows_per_step": 10, "phases": resolve_phases(cfg, {}, 10, 10)}
    return resolve_order(cfg, facts.weights, state, run)


def test_phases_become_segments_of_rows():
    assert order(PHASES) == SEGMENTS
    assert order(None) == [[0, {"a": 1.0, "b": 1.0}]]
    late = [{"until": 3, "weights": {"a": 1.0}}, {"weights": {"b": 1.0}}]
    assert order(late) == [[0, {"a": 1.0}], [30, {"b": 1.0}]]


@pytest.mark.parametrize(
    "cursor, phases, expected",
    [
        (20, PHASES, SEGMENTS),
        # other weights from the row that is next, whatever the new phases say of the past
        (20, None, [[0, {"a": 1.0}], [20, {"a": 1.0, "b": 1.0}]]),
        (70, None, [*SEGMENTS, [70, {"a": 1.0, "b": 1.0}]]),
        (0, None, [[0, {"a": 1.0, "b": 1.0}]]),
    ],
)
def test_on_resume_the_past_stays_as_it_was(cursor, phases, expected):
    assert order(phases, SEGMENTS, cursor=cursor) == expected


def test_a_source_that_is_gone_keeps_its_rows_in_the_past_and_gets_none_to_come():
    saved = [[0, {"a": 1.0, "c": 1.0}], [30, {"a": 1.0}]]
    assert order(None, saved, "a", cursor=60) == saved
    assert order(None, saved, "a", cursor=20) == [saved[0], [20, {"a": 1.0}]]


def phased(*phases, **more):
    """-> (Config, written, facts) of a run over a and b, 100 and 50 rows."""
    data = {"sources": {name: {"dir": name} for name in "ab"}, "phases": list(phases)}
    cfg, written = configured(data_dir=None, data=data, batch_size=10, **more)
    held = {"a": 100, "b": 50}
    return (
        cfg,
        written,
        facts_of(cfg, written, windows=150, weights={"a": 1.0, "b": 1.0}, held=held),
    )


TWICE = {"epochs": 2, "weights": {"a": 1}}
ONCE = {"epochs": 1, "weights": {"b": 1}, "lr_scale": 0.5, "warmup_steps": 0.4}


def test_phases_that_all_have_a_length_make_that_of_the_run():
    run = resolve(*phased(TWICE, ONCE)[::2], None, Findings())
    assert (run.max_steps, run.warmup_steps) == (25, 2)  # a tenth of the first schedule
    assert run.segments == [[0, {"a": 1.0}], [200, {"b": 1.0}]]
    assert run.phases == [
        {"step": 0, "name": None, "lr_scale": 1.0, "warmup_steps": None},
        {"step": 20, "name": None, "lr_scale": 0.5, "warmup_steps": 2},
    ]
    for keys, steps in (({"max_steps": 22}, 22), ({"num_epochs": 4}, 60)):  # what is written wins
        cut = resolve(*phased(TWICE, ONCE, **keys)[::2], None, Findings())
        assert cut.max_steps == steps and cut.phases[1]["step"] == 20
    # a warm-up in parts is a part of the schedule that the run begins with
    assert resolve(*phased(TWICE, ONCE, warmup_steps=0.5)[::2], None, Findings()).warmup_steps == 10


def test_other_phases_make_another_length_on_resume():
    cfg, written, facts = phased(TWICE, ONCE)
    run = resolve(cfg, facts, None, Findings())
    saved = state_of(run, cfg, written, cursor=100)
    assert resolve(cfg, facts, saved, Findings()) == run
    cfg, _, facts = phased(TWICE, ONCE | {"epochs": 3})
    longer = resolve(cfg, facts, saved, Findings())
    assert longer.max_steps == 35 and longer.segments == run.segments


def test_a_run_that_was_cut_short_keeps_the_phases_that_have_been():
    """Borders that are fractions of max_steps would move, and the rate of each step with them."""
    halves = ({"until": 0.5, "weights": {"a": 1}}, {"weights": {"b": 1}, "warmup_steps": 2})
    cfg, written, facts = phased(*halves, max_steps=40)
    run = resolve(cfg, facts, None, Findings())
    short = with_length(cfg, run, 30)
    saved = state_of(short, cfg, written, cursor=250)
    again = resolve(cfg, facts, saved, Findings())
    assert again == short and again.phases[1]["step"] == 20
    cfg, _, facts = phased(*halves, max_steps=60)  # asked for: then they do
    assert resolve(cfg, facts, saved, Findings()).phases[1]["step"] == 30


# ---------------------------------------------------------------- beside a checkpoint's run


def test_what_is_not_as_in_the_checkpoint_is_told_once_and_resolved():
    cfg, written = configured(max_steps=9)
    facts = facts_of(cfg, written)
    run = resolve(cfg, facts, None, Findings())
    state = state_of(run, cfg, written)
    assert compare(cfg, run, state) == []
    other, _ = configured(max_steps=9, z_loss=1e-4, resume="none", orchestrator={"mode": "off"})
    assert compare(other, dataclasses.replace(run, rows_per_step=32), state) == [
        "batch_tokens: 512 in the checkpoint, 1024 now",
        "z_loss: 0.0 in the checkpoint, 0.0001 now",
        "orchestrator.mode: act in the checkpoint, off now",
    ]
    state["config"]["prepare"] = {"out": "data/x", "sources": ["a"], "max_bad": 0.05}
    other = dataclasses.replace(cfg, prepare={"out": "data/y", "sources": ["a"], "clean": True})
    assert compare(other, run, state) == [
        "prepare.out: data/x in the checkpoint, data/y now",
        "prepare.clean: nothing in the checkpoint, True now",
        "prepare.max_bad: 0.05 in the checkpoint, nothing now",
    ]
    now = {"torch": "2", "threads": 1, "world": 1}
    state["versions"] = now | {"threads": 2}
    assert other_bits(run, now, state) == [
        "equal bits to the run so far cannot be promised: threads 2 -> 1"
    ]
    assert other_bits(dataclasses.replace(run, deterministic=False), now, state) == []


# ---------------------------------------------------------------- fine-tuning on few data


def tuned(windows, ranks=1, saved=None, epochs=3, **keys):
    """-> (batch_size, num_epochs, notes) of a fine-tuning whose user has written `keys`."""
    cfg, written = configured(**keys)
    if cfg.num_epochs is None and cfg.max_steps is None:
        cfg = dataclasses.replace(cfg, num_epochs=epochs)  # as finetune.read
    found = Findings()
    cfg = enough_steps(cfg, facts_of(cfg, written, ranks, windows=windows), saved, found)
    return cfg.batch_size, cfg.num_epochs, found.changes


def test_a_fine_tuning_on_few_data_gets_enough_steps():
    size, epochs, notes = tuned(19)
    assert (size, epochs) == (1, 7)
    text = "batch_size 1, num_epochs 7: 19 rows in steps of 16 are 3 steps, which teach"
    assert notes == [f"{text} little"]
    assert tuned(38, ranks=2)[:2] == (1, 7), "a row a rank"
    assert tuned(1)[:2] == (1, 120)
    assert tuned(150)[:2] == (1, 3), "never fewer epochs than on many data"
    assert tuned(150, epochs=1)[:2] == (1, 1), "preferences"
    assert tuned(160) == (16, 3, []), "30 steps"
    assert tuned(0) == tuned(1, ranks=2) == tuned(None) == (16, 3, []), "not a step, or not known"


@pytest.mark.parametrize(
    "keys",
    [
        {"batch_size": 16},
        {"batch_tokens": 16 * T},
        {"gradient_accumulation_steps": 1},
        {"num_epochs": 3},
        {"max_steps": 3},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_batch_or_length_that_somebody_wrote_stays(keys):
    epochs = None if "max_steps" in keys else 3
    assert tuned(19, **keys) == (16, epochs, [])


def test_a_fine_tuning_that_goes_on_keeps_its_epochs():
    """Its rows and steps are kept by resolve(); one from before there was the rule has 3 epochs
    among its written keys."""
    saved = {"written": {}, "config": {"num_epochs": 7}}
    assert tuned(19, saved=saved) == (16, 7, [])
    assert tuned(19, saved=saved | {"written": {"num_epochs": 3}}) == (16, 3, [])
