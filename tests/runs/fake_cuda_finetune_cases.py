"""finetune.py on a GPU that is not there (fake_cuda.py); test_fake_cuda.py runs these in a process
of their own."""

import math

import pytest
import torch
from conftest import read_lines
from fake_cuda import READS
from fake_cuda_cases import PRECISIONS, alike, gpu, grid, nightly, steady
from rig import at_iteration, faulty
from test_finetune import school, tuned, tuner, words

from train import Parallel

__all__ = ["gpu", "school", "words"]  # fixtures

LORA = ("--lora.r", 4)
INT8 = (*LORA, "--quantize_base", "int8")
DPO = ("--method", "dpo")
CASES = {  # kind of base, how it is trained; control tokens are new to each
    "sft": ("untied",),
    "lora": ("untied", *LORA, "--lora.dropout", 0.1),
    "lora_moe": ("moe", *LORA),
    "int8": ("moe", *INT8),
    "dpo": ("dense", *DPO),
    "dpo_lora": ("moe", *DPO, *INT8),
    "simpo": ("dense", "--method", "simpo"),
    "orpo": ("dense", "--method", "orpo", *LORA),
}


@pytest.fixture
def line(school, words):
    """line(case, name, *more) -> finetune.py's words on the GPU, all on that a step may hold."""

    def make(case, name="run", *more):
        kind, *how = CASES[case]
        data = school.pairs if "--method" in how else school.chats
        if kind == "moe":
            how += ["--expert_backend", "grouped_mm"]
        how += ["--device", "cuda", "--deterministic", "false", "--attention", "sdpa"]
        how += ["--log_interval", 2, "--save_interval", 0, "--eval_interval", 0, "--z_loss", 1e-4]
        how += ["--orchestrator.check_interval", 2, "--orchestrator.snapshot_interval", 3]
        return words(name, kind, "full", *how, *more, data=data)

    return make


# ---------------------------------------------------------------- steps

QUICK = {("int8", "mixed_fp16")}


@pytest.mark.parametrize(("case", "precision"), grid(CASES, PRECISIONS, quick=QUICK))
def test_no_step_waits_for_the_device(line, case, precision):
    """In fp16 only what is trained has a gradient for the loss scale to look at."""
    trainer = tuner(line(case, "run", "--precision", precision, "--max_steps", 20))
    steady(trainer)
    READS.are()
    assert trainer.orchestrator.dropped == 0 and trainer.step >= 5
    if precision == "mixed_fp16":
        assert trainer.loss_scale.value.inner > 1


@nightly
@pytest.mark.parametrize("recompute", ["selective", "block"])
@pytest.mark.parametrize("case", ["lora", "int8", "dpo_lora"])
def test_no_recomputed_step_waits_for_the_device(line, case, recompute):
    steady(tuner(line(case, "run", "--activation_checkpointing", recompute, "--max_steps", 20)))
    READS.are()


# ---------------------------------------------------------------- the same as on a CPU


def both(line, case, *more, parallel=Parallel, act=None) -> tuple:
    """The same run on the GPU and on the CPU; act(trainer) before it begins."""
    made = []
    for device in ("cuda", "cpu"):
        how = ["--log_interval", 1, "--max_steps", 6, "--device", device, "--lora.dropout", 0]
        if not set(LORA) & set(CASES[case]):
            how = how[:-2]
        trainer = tuner(line(case, device, *how, *more), parallel)
        if act:
            act(trainer)
        assert trainer.fit() == 0
        made.append(trainer)
    return tuple(made)


@nightly
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_a_cpu(line, case):
    """Evaluations with replies, snapshots, checkpoints; what is trained ends as there."""
    gpu, cpu = both(line, case, "--save_interval", 3, "--eval_interval", 2)
    alike(gpu, cpu)
    mine, other = gpu.tensors(), cpu.tensors()
    assert mine.keys() == other.keys() and all(tensor.is_cuda for tensor in mine.values())
    for name, p in cpu.weights.items():
        assert torch.allclose(gpu.weights[name].inner, p, rtol=1e-3, atol=1e-4), name
    kinds = [
        [row for row in read_lines(t.out / "metrics.jsonl") if "replies" in row] for t in (gpu, cpu)
    ]
    asks = "--method" not in CASES[case]
    assert [len(rows) for rows in kinds] == [4 * asks] * 2
    assert kinds[0] == kinds[1]


@nightly
@pytest.mark.parametrize("case", ["lora", "dpo_lora"])
def test_a_bad_step_is_dropped_like_on_a_cpu(line, case):
    """faulty spoils a gradient of all weights: here an adapter's."""
    gpu, cpu = both(line, case, parallel=faulty([2, 5], times=math.nan))
    alike(gpu, cpu)
    assert gpu.orchestrator.dropped == cpu.orchestrator.dropped == 2


@nightly
@pytest.mark.parametrize("case", ["int8", "dpo_lora"])
def test_back_to_a_snapshot_like_on_a_cpu(line, case):
    def act(trainer):
        at_iteration(trainer, {8: lambda t: t.rollback_steps(3)})

    gpu, cpu = both(line, case, "--max_steps", 10, act=act)
    alike(gpu, cpu)
    assert gpu.cursor > gpu.step * gpu.run.rows_per_step, "it went back"


@nightly
@pytest.mark.parametrize("case", ["int8", "dpo"])
def test_out_of_memory_is_learned_a_step_later_and_loses_nothing(line, case):
    def act(trainer):
        sides = 2 if case == "dpo" else 1

        def hook(module, inputs):
            if module.training and trainer.step >= 3 and len(inputs[0]) > sides:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")

        trainer.model.blocks[1].register_forward_pre_hook(hook)

    gpu, cpu = both(line, case, "--batch_size", 2, act=act)
    alike(gpu, cpu)
    assert gpu.run.micro_batch == 1 and gpu.run.accumulation == 4


@nightly
@pytest.mark.parametrize("case", ["lora_moe", "int8", "dpo_lora", "dpo"])
def test_a_resumed_run_has_the_bits_of_one_never_stopped(line, case):
    how = ("--precision", "mixed_fp16", "--save_interval", 3, "--lr_schedule", "constant")
    whole = tuned(line(case, "whole", *how, "--max_steps", 6))
    tuned(line(case, "parts", *how, "--max_steps", 3))
    parts = tuned(line(case, "parts", *how, "--max_steps", 6))
    assert parts.started_at == 3
    mine, other = parts.tensors(), whole.tensors()
    assert all(torch.equal(mine[name].inner, other[name].inner) for name in other)


# ---------------------------------------------------------------- evaluation


@nightly
@pytest.mark.parametrize("case", ["int8", "dpo_lora"])
def test_an_evaluation_waits_at_its_end(line, case):
    """And its replies once a token."""
    trainer = tuner(line(case, "run", "--eval_tokens", 2 * 128))
    with READS:
        trainer.evaluate()
    trainer.close()
    if case == "dpo_lora":
        READS.are({"lumen/reference.py evaluate tolist": 1})
        return
    tokens = READS.found["model.py generate copy to the host"]
    assert 0 < tokens <= 64
    reads = {
        "lumen/evaluation.py result tolist": 2,
        "lumen/evaluation.py result copy to the host": 1,
    }
    reads |= {f"model.py generate copy to the {place}": tokens for place in ("host", "device")}
    READS.are(reads)
