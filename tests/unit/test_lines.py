"""lumen/lines.py on plain values: what a run says, without a run."""

import math
import types

import pytest
import torch
import yaml

from lumen import lines, plan
from lumen.config import build_config
from lumen.lines import Start
from lumen.machine import Machine
from lumen.stopwatch import PARTS, Interval
from lumen.sums import StepNumbers
from model import ModelConfig

MODEL = {"vocab_size": 100, "d_model": 64, "n_layers": 4, "n_heads": 2, "max_seq_len": 32}


def config(model=None, **keys):
    tree = {"model": MODEL | (model or {}), "data_dir": "d", "out_dir": "out/x"}
    tree |= {"learning_rate": 3e-4} | keys  # a number, as after the start
    return build_config(tree, lambda key: "test", [])


def source(tokens=10_000, **changes):
    windows = (tokens - 1) // 32
    fields = {"tokens": tokens, "windows": windows, "unused": 3, "bare": False, "path": "d"}
    return types.SimpleNamespace(**fields | changes)


def start(cfg, **changes):
    run = types.SimpleNamespace(rows_per_step=8, micro_batch=2, accumulation=4, max_steps=100)
    run.min_lr, run.peak_step, run.precision = 1e-4, 5, "fp32"
    run.segments, run.phases = [[0, {"a": 1.0}]], []
    run.compile_model, run.deterministic, run.attention = False, True, "sdpa"
    run.attention_why, run.expert_backend, run.experts_why = "it is there", "slices", "fastest"
    machine = Machine(torch.device("cpu"), "a CPU", "fp32", False, [])
    fields = {"cfg": cfg, "run": run, "model": plan.on_meta(cfg.model), "machine": machine}
    fields |= {"layout": plan.Layout(1), "readers": 1, "n_working": 1000, "flops_per_token": 1e6}
    fields |= {"sources": {"a": source()}, "val_sources": {"a": source(1000)}, "peak": 1e12}
    return Start(**fields | changes)


def test_the_start_lines_name_everything():
    said = lines.start_lines(start(config(), notes=["of a key"]))
    heads = [line.split()[0] for line in said]
    for head in ("note", "model", "data", "batch", "length", "schedule", "compute", "memory"):
        assert head in heads, head
    text = "\n".join(said)
    assert "note       of a key" in text
    assert "256 tokens a step: 2 rows x 32 tokens x 4 micro-steps\n" in text
    assert (
        "100 steps, 25,600 tokens, 2.56 epochs that count as 24.8k tokens, 124 % of Chinchilla's 20k"
        in text
    )
    assert "vocab_size 100 is not a multiple of 64" in text
    there = lines.start_lines(start(config(), elsewhere=True))
    assert not any(line.startswith(("compute", "device", "memory")) for line in there)


def test_data_that_are_not_prepared_yet():
    said = "\n".join(lines.start_lines(start(config(), sources={}, val_sources={})))
    assert "not prepared yet" in said and "epochs" not in said and "no evaluation" not in said


@pytest.mark.parametrize(
    "keys, steps, up, at_peak, last, text",
    [
        ({"learning_rate": 0.1}, 100, 5, 0.1, 0.0, "learning_rate 0.1 is far above"),
        ({}, 100, 100, 0.0, 2e-4, "never comes above 0.0002"),
        ({"lr_schedule": "wsd"}, 100, 50, 1e-4, 0.0, "wsd's decay begins within the warm-up"),
        ({}, 100, 5, 3e-4, 0.0, None),
    ],
)
def test_advice_on_the_learning_rate(keys, steps, up, at_peak, last, text):
    said = lines.rate_advice(config(**keys), steps, up, at_peak, last)
    assert text in said[0] if text else said == []


def test_advice_on_validation():
    two, few = {"a": source(), "b": source()}, {"a": source(65)}
    cfg = config()
    assert lines.validation_advice(cfg, {}, {}) == []
    assert "window of 33 tokens" in lines.validation_advice(cfg, two, {})[0]
    assert "val_fraction is 0" in lines.validation_advice(config(val_fraction=0.0), two, {})[0]
    missing, noise = lines.validation_advice(cfg, two, few)
    assert "no validation in b" in missing and "reads 2 rows" in noise


def test_sparse_lines():
    assert lines.sparse_lines(ModelConfig(**MODEL), "", "", 100) == []
    sparse = {"n_experts": 4, "n_experts_per_token": 2, "n_shared_experts": 1}
    m = ModelConfig(**MODEL, **sparse, mod_capacity=0.5, mod_every=2, mod_anneal_steps=200)
    said = lines.sparse_lines(m, "slices", "fastest", 100)
    assert said[0].startswith("experts    2 of 4 x") and "1 shared in 4 layers" in said[0]
    assert said[0].endswith("dropless") and said[1] == "backend    slices: fastest"
    assert "capacity 0.5, block of 2 layers, from 1.0 over 200 steps" in said[2]
    assert "the run ends before capacity has fallen" in said[3]
    assert "will not export" in said[4]


def interval():
    spent = dict.fromkeys(PARTS, 0.0) | {"data": 1.0, "compute": 3.0}
    return Interval(steps=10, seconds=5.0, spent=spent)


def two_sources() -> dict:
    return lines.epoch_row({"a": 0.5, "b": 1.25}, {"a": 10, "b": 5}, 32)


def test_a_log_step():
    numbers = StepNumbers(step=9, cursor=80, iteration=10, lr=1e-3, loss=2.0, grad_norm=1.5)
    row = {"step": 10} | lines.step_row(numbers)
    row |= lines.speed_row(interval(), tokens=100, flops=1e6, peak=1e9)
    assert row["ppl"] == pytest.approx(math.exp(2)) and row["tokens_per_second"] == 200
    assert row["mfu"] == pytest.approx(0.2) and row["data_wait"] == 0.2
    assert row["time/compute"] == 0.75
    row |= lines.memory_row(torch.device("cpu")) | two_sources()
    assert row["mem_reserved"] is None and row["epoch/b"] == 1.25 and row["tokens/a"] == 320
    said = lines.step_line(row | {"aux_loss": 0.0123}, 100, gone=61.0, left=3600.0)
    assert said.startswith("step     10/100  loss 2.0000  ppl 7.389  aux 0.0123  lr 1.00e-03")
    assert said.endswith("mfu 20 %  waits for data 20 %  1m01s gone, 1h00m left")
    busy = lines.step_line(row | {"data_wait": 0.04}, 100, gone=61.0, left=3600.0)
    assert busy.endswith("mfu 20 %  1m01s gone, 1h00m left"), "a wait that costs nothing"
    slow = lines.speed_row(interval(), tokens=100, flops=1e9, peak=1e9)
    assert slow["mfu"] is None, "the peak was measured too low"
    assert lines.health_row("warning", ["why"])["health_level"] == 1
    assert lines.epoch_row({"data": 2.0}, {"data": 7}, 32) == {"epoch": 2.0}


def expert_layer(balance, tokens, violation):
    layer = {"load_balance_loss": balance, "router_z": 2.0, "tokens": tokens}
    return layer | {"max_violation": violation, "per_expert_utilization": [0.75, None]}


def test_sparse_layers_in_a_log_step():
    """The balance loss is made with the weight that is in force, not with the configured one."""
    layers = {1: expert_layer(1.5, 100, 0.5), 3: expert_layer(2.0, 50, 1.0)}
    experts = {"layers": layers, "max_violation": 1.0, "routing_entropy": 1.2, "max_entropy": 1.4}
    experts |= {"dead": 0, "tokens_dropped": 7, "bias_range": [-0.1, 0.2], "confidence": 0.5}
    experts |= {"token_entropy": 1.0, "null_share": 0.0}
    row = lines.experts_row(experts, tokens=100, aux_weight=0.5, z_weight=0.1)
    assert row["aux_loss"] == pytest.approx(0.5 * (1.5 * 100 + 2.0 * 50) / 100)
    assert row["router_z_loss"] == pytest.approx(0.1 * 2.0 * 150 / 100)
    assert row["experts/bias_max"] == 0.2 and row["experts/share/3"] == [0.75, None]
    depth = {"capacity_factor": 0.5, "average_depth": 3.0, "predictor_agreement": 0.9}
    depth |= {"predictor_loss": 0.4, "per_layer_usage": {1: 0.5}, "position_usage": [1.0, 0.0]}
    assert lines.depth_row(depth)["depth/usage/1"] == 0.5
    said = lines.routing_lines(experts, depth, n_layers=4)
    assert "hottest 2.00 x fair (layer 3), entropy 1.200 of 1.400 nats" in said[0]
    assert said[1] == "depth      3.00 of 4 layers a token, capacity 0.500, predictor agrees 90.0 %"
    bars = lines.routing_bars(experts, depth)
    assert list(bars) == ["experts/share/1", "experts/share/3", "depth/position"]
    assert lines.routing_bars(None, None) == {} and lines.routing_lines(None, None, 4) == []


def test_an_evaluation():
    row = {"step": 5, "val_loss": 2.5, "val_ppl": 12.18, "val_accuracy": 0.25, "val_bpb": None}
    row |= {"best_val_loss": 2.0, "best_step": 3}
    m = ModelConfig(**MODEL)
    assert lines.evaluation_lines(row, False, 1.25, m) == [
        "eval       step 5: val_loss 2.5000 (ppl 12.18), 25.0 % right (best 2.0000 at step 3), 1.2 s"
    ]
    row |= {"val_loss": 9.0, "val_bpb": 1.5, "val_loss_as_trained": 8.0, "mod_gap": 1.0}
    row |= {"mod_agreement": 0.9, "mod_depth": 3.5}
    first, second = lines.evaluation_lines(row, True, 1.0, m)
    assert "1.5000 bits per byte" in first and "right (best), 1.0 s" in first
    assert "gap +1.0000" in second and "3.50 of 4 layers" in second
    row |= {"val_loss/a": 2.0, "val_loss/b": 90.0}
    each = lines.evaluation_lines(row, True, 1.0, m)[1].strip()
    assert each == "a 2.0000 (ppl 7.389), b 90.0000 (ppl 5.185e+21)"


def test_config_and_suggestion_are_yaml():
    cfg = config(max_steps=100, batch_size=2)
    run = start(cfg).run
    run.warmup_steps = 5
    again = yaml.safe_load(lines.config_yaml(cfg, run))
    assert again["batch_tokens"] == 256 and again["resume"] == "auto"
    assert "gradient_accumulation_steps" not in again and again["num_epochs"] is None
    written = {"batch_size": 4, "max_steps": 9, "out_dir": "x", "seed": 3}
    written["orchestrator"] = {"mode": "act", "replay": "old/decisions.jsonl"}
    text = lines.suggestion(start(cfg), written, 0.5, "4 did not fit", rollbacks=2, lr_cut=0.5)
    keys = yaml.safe_load(text)
    assert keys["batch_size"] == 2 and keys["batch_tokens"] == 256 and keys["seed"] == 3
    assert keys["orchestrator"] == {"mode": "act"} and "out_dir" not in keys
    assert keys["learning_rate"] == cfg.learning_rate * 0.5
    assert "4 was asked for; 4 did not fit" in text and "rolled back 2 times" in text


def test_the_console_is_for_reading():
    """What everybody wants to know fits a terminal; what few ask for is in train.log alone."""
    cfg = config({"n_experts": 8, "router": "sigmoid"})
    shown = []
    for line in lines.start_lines(start(cfg)):
        if line.split()[0] not in lines.DETAILS:
            shown.append(line)
    assert [line for line in shown if len(line) > 110] == []
    heads = {line.split()[0] for line in shown}
    assert heads >= {"model", "parameters", "experts", "data", "batch", "length", "device"}
    assert heads >= {"schedule", "memory"}, "and advice is never a detail"
    assert "advice" not in lines.DETAILS and "note" not in lines.DETAILS


def test_the_first_step_says_what_guessing_costs():
    first = lines.first_line(1, 100, 4.61, 100)
    assert first == "step      1/100  loss 4.6100  (guessing: 4.61)"
    assert lines.first_line(51, 100, 2.0, 0) == "step     51/100  loss 2.0000", "a resumed run"
