"""Idle is identical: an orchestrator that does nothing changes nothing."""

import json

import pytest
from conftest import fingerprint
from forks import run_forked
from rig import KINDS, decisions, equal, finish, tensors

SHADOW = (
    "moe cosine 2",
    "hybrid wsd 2",
)  # shadow does all that act does but act: two of them say so
IDLE = [  # pairwise over kind, schedule, accumulation, dropout; compiled below; the full cross is nightly
    ("dense", "cosine", 1, 0.0),
    ("dense", "wsd", 2, 0.1),
    ("moe", "wsd", 1, 0.1),
    ("moe", "cosine", 2, 0.0),
    ("mod", "cosine", 2, 0.1),
    ("mod", "wsd", 1, 0.0),
    ("hybrid", "wsd", 2, 0.0),
    ("hybrid", "cosine", 1, 0.1),
]


def same_in_all_modes(tiny, kind, schedule, accumulate, dropout, shadow=True, **changes):
    """off is what there is without an orchestrator."""
    rows = {"batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
    length = {"max_steps": 100, "save_interval": 40, "log_interval": 10, "lr_schedule": schedule}
    keys = tiny("run", KINDS[kind] | {"dropout": dropout}, **length | rows | changes)
    block = {"check_interval": 20, "snapshot_interval": 10}
    modes = {
        "off": {"use_adaptive_training": False, "orchestrator": block},
        "act": {"orchestrator": block},
        "shadow": {"orchestrator": block | {"mode": "shadow"}},
    }
    if not shadow:
        del modes["shadow"]
    found = {}
    for name, more in modes.items():
        trainer = finish(keys | {"out_dir": f"{keys['out_dir']}-{name}"} | more)
        assert trainer.orchestrator.cfg.mode == name and decisions(trainer) == []
        found[name] = tensors(trainer)
    assert all(equal(found["off"], other) for other in found.values())


@pytest.mark.parametrize("kind, schedule, accumulate, dropout", IDLE)
def test_idle_is_identical(tiny, kind, schedule, accumulate, dropout):
    shadow = f"{kind} {schedule} {accumulate}" in SHADOW
    same_in_all_modes(tiny, kind, schedule, accumulate, dropout, shadow)


@pytest.mark.parametrize("kind", ["dense", pytest.param("moe", marks=pytest.mark.nightly)])
def test_idle_is_identical_when_compiled(tiny, kind):
    found = []
    for mode in ("off", "act"):
        keys = tiny(mode, KINDS[kind], compile_model=True, max_steps=80, save_interval=0)
        block = {"mode": mode, "snapshot_interval": 10, "check_interval": 20}
        found.append(tensors(finish(keys | {"orchestrator": block})))
    assert equal(*found)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("compiled", [False, True])
def test_idle_is_identical_everywhere(tiny, kind, schedule, accumulate, dropout, compiled):
    same_in_all_modes(tiny, kind, schedule, accumulate, dropout, compile_model=compiled)


THREE = pytest.param(3, ("moe",), marks=pytest.mark.nightly)  # 18 s


@pytest.mark.parametrize("ranks, kinds", [(2, ("dense", "hybrid")), THREE])
def test_idle_is_identical_on_several_ranks(tiny, ranks, kinds):
    jobs = []
    for kind in kinds:
        for mode in ("off", "act", "shadow"):
            keys = tiny(f"{kind}-{mode}", KINDS[kind], max_steps=80, batch_size=1, save_interval=0)
            block = {"mode": mode, "snapshot_interval": 10, "check_interval": 20}
            jobs.append({"config": keys | {"orchestrator": block}})
    result = run_forked("tests/programs/ranks.py", json.dumps(jobs), ranks=ranks)
    assert result.returncode == 0, result.stderr[-3000:]
    for i in range(0, len(jobs), 3):
        prints = [fingerprint(job["config"]["out_dir"], 80) for job in jobs[i : i + 3]]
        files = [{k: v for k, v in p.items() if k.endswith(".safetensors")} for p in prints]
        assert files[0] and files[0] == files[1] == files[2]
