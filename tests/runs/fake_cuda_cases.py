"""On a GPU that is not there (fake_cuda.py); test_fake_cuda.py runs these in a process of their
own."""

import itertools
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_cuda
import numpy as np
import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from conftest import read_lines
from fake_cuda import READS, Event
from rig import actions, at_iteration, faulty, finish
from sparse_models import KINDS, make

import kernels_triton
from lumen import experts, feed, machine, sampling
from lumen.optim import OPTIMIZERS
from lumen.parallel import Parallel
from model import Transformer
from train import Trainer

nightly = pytest.mark.nightly
SPARE = {"n_experts": 4, "d_expert": 16, "n_experts_max": 6, "router": "sigmoid"}
MODELS = KINDS | {
    "lunaris": {"norm_order": "lunaris", "rope_first": True, "tie_embeddings": False},
    "noisy": {"n_experts": 4, "d_expert": 16, "router_jitter": 0.1, "capacity_factor": 1.0},
    "thinned": SPARE | {"expert_dropout": 0.3, "routing_temperature": 0.7},
    "annealed": {"mod_capacity": 0.25, "mod_anneal_steps": 8},
}
PRECISIONS = ("fp32", "mixed_bf16", "mixed_fp16")
QUICK = {("dense", "mixed_fp16"), ("hybrid", "mixed_bf16")}


def grid(*axes, quick):
    """All combinations; those that are not in `quick` at night."""
    cases = []
    for case in itertools.product(*axes):
        cases.append(pytest.param(*case, marks=() if case in quick else nightly))
    return cases


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    fake_cuda.plug_in(monkeypatch)
    # 8,192 rows and columns on a GPU
    monkeypatch.setattr(machine, "matrix_peak", lambda *_: 1e14)
    with fake_cuda.Gpu():
        yield


@pytest.fixture
def keys(tiny):
    """keys(**changes) -> a short run on the GPU, with everything on that a step may hold."""

    def make(name="run", model=None, **changes):
        run = {"device": "cuda", "z_loss": 1e-4, "expert_backend": "grouped_mm", "save_interval": 0}
        run |= {"log_interval": 2, "max_steps": 5, "eval_tokens": 256, "attention": "sdpa"}
        run["orchestrator"] = {"check_interval": 2, "snapshot_interval": 3}
        return tiny(name, model, **run | changes)

    return make


class Replica(Parallel):
    """What surgery and the checksum ask of Parallel."""

    def __init__(self):
        self.world = 1


# ---------------------------------------------------------------- the device itself


def test_what_a_gpu_waits_for_is_written_down():
    x = torch.ones(3, device="cuda", requires_grad=True)
    (x * 2).sum().backward()
    assert x.grad.is_cuda and x.grad.inner.tolist() == [2, 2, 2]
    x = x.detach()
    waits = {
        "item": lambda: x.sum().item(),
        "tolist": lambda: x.tolist(),
        "equal": lambda: torch.equal(x, x),
        "nonzero": lambda: x.nonzero(),
        "mask as index": lambda: x[x > 1],
        "index on the CPU": lambda: x[torch.tensor([0, 1])],
        "copy to the host": lambda: x.to("cpu", non_blocking=True),
        "copy to the device": lambda: torch.ones(2).to("cuda", non_blocking=True),
        "print": lambda: str(x),
        "synchronize": lambda: torch.cuda.synchronize(),
    }
    for what, act in waits.items():
        with READS:
            act()
        assert [place.split(" ", 2)[2] for place in READS.found] == [what]
        assert all(line.startswith("?") for line in READS.lines), "no line of ours"
    with READS:
        bool(x[0] == 1)
        x[0] = 1.0  # torch copies a number of the CPU
    READS.are({"? ? item": 1, "? ? copy to the device": 1})
    free = torch.ones(2).pin_memory()
    with READS:
        x + free.to("cuda", non_blocking=True).sum()
        x[x > 0] = 0.0
        x[1:] = 3.0
        x * torch.tensor(2.0)
    READS.are()
    with pytest.raises(RuntimeError, match="on the CPU"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="on the CPU"):
        torch.ones(3).index_select(0, torch.zeros(1, dtype=torch.long, device="cuda"))


def test_a_copy_to_the_host_is_garbage_until_it_was_waited_for():
    x = torch.arange(3.0, device="cuda")
    with READS:
        host, arrived = feed.to_host(x)
        x += 1
        assert host.isnan().all()
        arrived.synchronize()
    assert host.tolist() == [0, 1, 2]
    READS.are()


# ---------------------------------------------------------------- steps


def steady(trainer, steps=4) -> None:
    """Some iterations of a run that has begun; READS has what the host waited for in them."""
    run = trainer.iterations()
    next(run)
    next(run)  # the first step is made
    Event.waits.clear()
    begin = fake_cuda.QUEUED[0]
    with READS:
        for _ in itertools.islice(run, steps):
            pass
    queued = (fake_cuda.QUEUED[0] - begin) / steps
    run.close()
    trainer.close()
    # the numbers of a step are waited for when all of the next one is queued
    assert len(Event.waits) >= steps - 1 and min(Event.waits) > 0.9 * queued


@pytest.mark.parametrize(("kind", "precision"), grid(MODELS, PRECISIONS, quick=QUICK))
def test_no_step_waits_for_the_device(keys, kind, precision):
    steady(Trainer(keys(model=MODELS[kind], precision=precision, max_steps=20)))
    READS.are()


@nightly
@pytest.mark.parametrize("recompute", ["selective", "block"])
@pytest.mark.parametrize("kind", ["dense", "hybrid", "noisy"])
def test_no_recomputed_step_waits_for_the_device(keys, kind, recompute):
    how = {"activation_checkpointing": recompute, "max_steps": 20}
    steady(Trainer(keys(model=MODELS[kind], **how)))
    READS.are()


def test_slices_wait_twice_a_layer_and_microstep(keys):
    how = {"expert_backend": "slices", "max_steps": 20}
    steady(Trainer(keys(model=MODELS["fine"], **how)))
    READS.are({"kernels.py forward_slices tolist": 16, "kernels.py backward_slices tolist": 16})


# ---------------------------------------------------------------- the same as on a CPU


def both(keys, parallel=Parallel, act=None, **changes) -> tuple[Trainer, Trainer]:
    """The same run on the GPU and on the CPU; act(trainer) before it begins."""
    made = []
    for device in ("cuda", "cpu"):
        here = {"device": device, "deterministic": False}
        trainer = Trainer(keys(name=device, **changes | here), parallel)
        if act:
            act(trainer)
        assert trainer.fit() == 0
        made.append(trainer)
    return tuple(made)


def alike(a: Trainer, b: Trainer) -> None:
    """The same numbers but for rounding, the same decisions, in the same order."""
    rows = [read_lines(t.out / "metrics.jsonl") for t in (a, b)]
    compared = 0
    for one, other in zip(*rows, strict=True):
        for name in ("step", "loss", "grad_norm", "val_loss", "val_accuracy"):
            assert (name in one) == (name in other)
            if one.get(name) is not None:
                assert one[name] == pytest.approx(other[name], rel=1e-3, nan_ok=True), name
                compared += 1
    assert compared > 10
    assert actions(a) == actions(b)
    assert (a.step, a.cursor, a.tokens) == (b.step, b.cursor, b.tokens)


@pytest.mark.parametrize("kind", grid(MODELS, quick={("hybrid",)}))
def test_a_run_is_that_of_a_cpu(keys, kind):
    model = MODELS[kind] | {"dropout": 0.0}
    alike(*both(keys, model=model, max_steps=4, save_interval=2, log_interval=1))


@pytest.mark.parametrize("precision", grid(PRECISIONS, quick={("mixed_bf16",)}))
def test_muons_steps_do_not_wait_either(keys, precision):
    more = {"optimizer": "muon", "precision": precision}
    steady(Trainer(keys(model=MODELS["hybrid"], max_steps=20, **more)))
    READS.are()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_step_is_dropped_like_on_a_cpu(keys, optimizer):
    spoils, more = faulty([2, 5], value=math.nan), {"optimizer": optimizer}
    gpu, cpu = both(keys, spoils, model={"dropout": 0.0}, max_steps=6, log_interval=1, **more)
    alike(gpu, cpu)
    assert gpu.orchestrator.dropped == cpu.orchestrator.dropped == 2


@nightly
def test_out_of_memory_is_learned_a_step_later_and_loses_nothing(keys):
    def act(trainer):
        def hook(module, inputs):
            if module.training and trainer.step >= 3 and len(inputs[0]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")

        trainer.model.blocks[1].register_forward_pre_hook(hook)

    short = {"model": {"dropout": 0.0}, "max_steps": 8, "log_interval": 1, "batch_size": 4}
    gpu, cpu = both(keys, act=act, **short)
    alike(gpu, cpu)
    assert gpu.run.micro_batch == 2


@nightly
@pytest.mark.parametrize("kind", ["dense", "slots", "hybrid"])
def test_back_to_a_snapshot_like_on_a_cpu(keys, kind):
    def act(trainer):
        at_iteration(trainer, {8: lambda t: t.rollback_steps(3)})

    how = {"model": MODELS[kind] | {"dropout": 0.0}, "max_steps": 10, "log_interval": 1}
    gpu, cpu = both(keys, act=act, **how)
    alike(gpu, cpu)
    assert gpu.cursor > gpu.step * gpu.run.rows_per_step, "it went back"


@nightly
def test_a_resumed_run_has_the_bits_of_one_never_stopped(keys):
    how = {"model": MODELS["hybrid"], "precision": "mixed_fp16", "save_interval": 3}
    how |= {"lr_schedule": "constant"}
    whole = finish(keys(name="whole", max_steps=6, **how))
    finish(keys(name="parts", max_steps=3, **how))
    parts = finish(keys(name="parts", max_steps=6, **how))
    assert parts.started_at == 3
    mine, other = parts.tensors(), whole.tensors()
    assert all(torch.equal(mine[name].inner, other[name].inner) for name in other)


def test_the_checksum_of_weights_is_that_of_a_cpu():
    model = make(**MODELS["fine"])
    there = on_gpu(model)
    with READS:
        mine = Replica().checksum(there)
    READS.are()
    assert mine.is_cuda and mine.inner == Replica().checksum(model)


# ---------------------------------------------------------------- backends


def triton_on_fake_cuda(monkeypatch):
    for name, kernel in vars(kernels_triton).copy().items():
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernels_triton, name, fake_cuda.Launch(kernel))


@nightly
def test_tritons_kernels_get_tensors_of_the_device_and_nobody_waits(keys, monkeypatch):
    triton_on_fake_cuda(monkeypatch)
    small = {"n_experts": 2, "n_experts_per_token": 1, "d_expert": 16, "max_seq_len": 8}
    how = {"expert_backend": "triton", "batch_size": 1, "max_steps": 20}
    trainer = Trainer(keys(model=small, **how))
    trainer.model.fused_loss = True  # with the interpreter nobody would choose it
    steady(trainer, steps=2)
    READS.are()


def fake_flash(monkeypatch):
    """What the package flash_attn takes: tensors of a GPU, 16 bits, causal."""

    def flash_attn_func(q, k, v, causal, deterministic=False):
        assert all(t.is_cuda and t.dtype.itemsize == 2 for t in (q, k, v)) and causal
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        gqa = {"is_causal": True, "enable_gqa": True}
        return F.scaled_dot_product_attention(q, k, v, **gqa).transpose(1, 2)

    module = SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def test_flash_attention_gets_what_it_takes(keys, monkeypatch):
    fake_flash(monkeypatch)
    how = {"attention": "flash", "precision": "mixed_bf16", "max_steps": 20}
    trainer = Trainer(keys(model=MODELS["mod"], **how))
    assert trainer.model.backend == "flash"
    steady(trainer)
    READS.are()


# ---------------------------------------------------------------- documents


@pytest.fixture
def documents(shards, tmp_path) -> dict:
    """Keys of a run on bare shards whose documents do not see each other."""
    for file in sorted(Path(shards).glob("part_?.npy")):
        shutil.copy(file, tmp_path)
        starts = np.cumsum(np.random.default_rng(0).integers(1, 40, 600))
        starts = np.concatenate([[0], starts[starts < 7000], [7000]]).astype("<u8")
        np.save(tmp_path / f"{file.stem}.docs.npy", starts)
    return {"data_dir": str(tmp_path), "document_mask": True, "max_steps": 20}


@pytest.mark.parametrize("kind", ["hybrid", *(pytest.param(k, marks=nightly) for k in MODELS)])
def test_no_step_on_documents_waits_for_the_device(keys, documents, kind):
    """Nor does it by a bias on whole rows, which serves where no kernel knows documents."""
    steady(Trainer(keys(model=MODELS[kind], **documents)))
    READS.are()


def test_a_run_on_documents_is_that_of_a_cpu(keys, documents):
    how = documents | {"max_steps": 4, "save_interval": 2, "log_interval": 1}
    alike(*both(keys, model=MODELS["hybrid"] | {"dropout": 0.0}, **how))


def test_varlen_gets_what_it_takes(keys, documents, monkeypatch):
    def varlen(q, k, v, ends, *more, window_size):
        assert ends.is_cuda and ends.dtype == torch.int32 and q.dtype == torch.bfloat16
        assert q.shape[1:] == k.shape[1:] == v.shape[1:] and window_size == (-1, 0)
        at = torch.arange(len(q), device="cuda")
        of = torch.searchsorted(ends, at, right=True)
        own = (of[:, None] == of) & (at[:, None] >= at)
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=own).transpose(0, 1)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen)
    how = documents | {"attention": "varlen", "precision": "mixed_bf16"}
    trainer = Trainer(keys(model=MODELS["mod"], **how))
    assert trainer.model.backend == "varlen"
    steady(trainer)
    READS.are()


# ---------------------------------------------------------------- evaluation, text


@pytest.mark.parametrize("kind", grid(MODELS, quick={("hybrid",), ("dense",)}))
def test_an_evaluation_waits_at_its_end(keys, kind):
    trainer = Trainer(keys(model=MODELS[kind], expert_backend="grouped_mm"))
    with READS:
        trainer.evaluate()
    trainer.close()
    allowed = {
        "lumen/evaluation.py result tolist": 2,
        "lumen/evaluation.py result copy to the host": 1,
    }
    # rows keep different numbers of tokens there, so each layer asks how many
    routed = len(trainer.mod)
    batches = len(trainer.val_set) // trainer.run.micro_batch
    if routed:
        allowed["model_moe.py causal_forward item"] = routed * batches
    READS.are(allowed)


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


def on_gpu(model) -> Transformer:
    with torch.device("cuda"):
        there = Transformer(model.cfg)
    there.load_state_dict(model.state_dict())
    return there


def text(model, **options) -> list:
    return list(model.generate(PROMPTS, 6, [1, 2, 3], **options))


def text_reads(model, tokens: int) -> dict:
    """A copy of the logits a token, the ids back; MoD's rows keep different numbers of tokens, so
    each of its layers asks how many."""
    reads = {"model.py generate copy to the host": tokens}
    reads["model.py generate copy to the device"] = tokens + 1  # the prompts
    routed = len(model.sparse_layers("mod"))
    if routed:
        reads["model_moe.py causal_forward item"] = routed * tokens
    return reads


@pytest.mark.parametrize("kind", grid(MODELS, quick={("dense",), ("hybrid",)}))
def test_text_costs_one_copy_a_token_and_is_that_of_a_cpu(kind):
    model = make(**MODELS[kind])
    want = text(model)
    there = on_gpu(model)
    with READS:
        got = text(there)
    assert got == want
    READS.are(text_reads(there, len(got)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_text_by_every_rule_in_half_precision(dtype):
    there = on_gpu(make(**MODELS["fine"]))
    there.compute_dtype = dtype
    rules = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    rule = sampling.Sampling(PROMPTS, 97, repetition_penalty=1.2, **rules)
    with READS:
        got = text(there, choose=rule, n_vocab=90)
    READS.are(text_reads(there, len(got)))


# ---------------------------------------------------------------- experts


def surgery(model, optimizer) -> list:
    """Split, prune, restore, recycle, release; what the routers say afterwards."""
    layers = model.sparse_layers("moe")
    moe, rows = layers[0], Replica()
    with torch.no_grad():
        moe.router.load.copy_(torch.tensor([0.4, 0.3, 0.3, 0.0, 0.0, 0.0]))
    said = [experts.add_expert(moe, optimizer, 1, rows)]
    experts.prune_expert(moe, 2, 3, optimizer=optimizer, rows=rows)
    experts.restore_expert(moe, 3, 3)
    said.append(experts.recycle_expert(moe, optimizer, 4, rows))
    moe.experts.w2.data[4].mul_(-1)
    experts.release_parted(layers, 50, rows, said.append)
    said.append(experts.slots_of(moe))
    return said


def test_surgery_on_the_device_is_that_of_a_cpu(keys):
    def act(trainer):
        at_iteration(trainer, {3: lambda t: answers.append(surgery(t.model, t.optimizer))})

    answers = []
    how = {"model": MODELS["slots"] | {"dropout": 0.0}, "max_steps": 5, "log_interval": 1}
    gpu, cpu = both(keys, act=act, **how)
    assert repr(answers[0]) == repr(answers[1])
    alike(gpu, cpu)
    for name, tensor in cpu.tensors().items():
        mine = gpu.tensors()[name].inner
        assert torch.allclose(mine, tensor, rtol=1e-3, atol=1e-5), name
