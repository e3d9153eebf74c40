"""Steps and expert layers, timed: ours against transformers', sparse against dense, on any device.

The commands `kernels` and `step` of tools/bench.py; tools/gpu_parts.py takes steps by them too. In
this order: what is measured; one step of ours, one of theirs; an expert layer; attention; whole
models.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import math
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

import kernels
import kernels_attention
from kernels_attention import Documents
from lumen import heap, tryout
from lumen import machine as machines
from lumen.attention import Shape, pick_attention, shape_of
from lumen.config import Config
from lumen.errors import UserError
from lumen.experts import update_balance
from lumen.machine import human_number
from lumen.optim import build_optimizer, clip_factor, step_optimizer
from lumen.parallel import trained
from lumen.sums import sum_dtype
from model import ModelConfig, Transformer
from tools import timing
from train import Parallel

# ---------------------------------------------------------------- what is measured

KERNELS = {  # tokens, d_model, an expert's width, experts, experts per token
    "toy": [(64, 32, 16, 4, 2)],
    "cpu": [(4096, 384, 512, 8, 2), (4096, 384, 64, 64, 8)],
    "cuda": [(32768, 1536, 512, 128, 10), (32768, 2048, 768, 128, 8)],
}
STEP = {
    "vocab_size": 8192,
    "d_model": 384,
    "n_layers": 6,
    "n_heads": 6,
    "n_kv_heads": 2,
    "max_seq_len": 512,
}
GRAINS = {  # name: the MoE, and d_ff of the dense model with the same active width
    "8 experts of 512, top-2": ({"n_experts": 8, "n_experts_per_token": 2, "d_expert": 512}, 1024),
    "64 experts of 64, top-8": ({"n_experts": 64, "n_experts_per_token": 8, "d_expert": 64}, 512),
}
PAIRS = (
    ("our MoE", "our dense"),
    ("peer MoE", "peer dense"),
    ("peer MoE", "our MoE"),
    ("peer dense", "our dense"),
)
TOY = {"vocab_size": 128, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 32, "max_seq_len": 32}
HALF = {"mod_capacity": 0.5, "mod_every": 2}


def size_options(words: list[str], **known):
    """timing.options with --device and --size, a key of KERNELS. E002 for another size."""
    o = timing.options(words, device="auto", size="", **known)
    if o.size not in ("", *KERNELS):
        text = f"--size: {o.size!r} is not one of {', '.join(KERNELS)}"
        raise UserError("E002", f"command line: tools.bench: {text}")
    return o


# ---------------------------------------------------------------- one step of a model


class Step:
    """One optimizer step of a model on random ids, a call, from the trainer's own parts.

    model: as the run prepares it, on the device. A learning rate of 0 in cfg is the same work, and
    the routing of the first step in all rounds.
    """

    def __init__(self, cfg: Config, model: Transformer, machine, rows: int, deterministic: bool):
        self.cfg, self.model, self.machine = cfg, model, machine
        self.deterministic = deterministic
        self.parallel = Parallel(cfg)
        self.tokens = rows * model.cfg.max_seq_len
        self.moe = list(model.sparse_layers("moe").values())
        self.optimizer = build_optimizer(cfg, dict(model.named_parameters()), machine.precision)
        self.x, self.y = batch(model.cfg, rows, machine.device)
        self.docs = None
        model.train()

    def __call__(self) -> torch.Tensor:
        """Returns the mean loss, on the device."""
        return self.update(self.micro_step())

    def micro_step(self) -> dict[str, torch.Tensor]:
        """Forward and backward; returns the model's sums."""
        torch.use_deterministic_algorithms(self.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False
        total, sums = self.model(self.x, targets=self.y, docs=self.docs)
        (total / self.tokens).backward()
        return sums

    def update(self, sums: dict[str, torch.Tensor]) -> torch.Tensor:
        """The rest of the step; returns the mean loss."""
        model, parallel = self.model, self.parallel
        stats = torch.stack([sums["ce"], sums["z"], sums["count"]])
        stats = stats.to(sum_dtype(self.machine.device))
        ce, _, count = parallel.reduce(model, stats)
        factor = (self.tokens / count).float()
        norm = parallel.grad_norm(model) * factor
        bad = ~(torch.isfinite(ce) & torch.isfinite(norm))
        clip = clip_factor(norm, self.cfg.grad_clip)
        step_optimizer(self.optimizer, trained(model), clip * factor, bad)
        if self.moe:
            update_balance(self.moe, sums["moe.counts"], bad)
        return ce / count


class Ours(Step):
    """A Step of our model as `auto` would have it here."""

    def __init__(self, model: ModelConfig, machine, rows: int, compiled=False, backend="auto"):
        cfg = Config(model=model, batch_size=rows, device=str(machine.device), learning_rate=0.0)
        deterministic = machine.device.type == "cpu"  # what `deterministic: auto` means
        if deterministic:  # a CPU
            heap.keep_pages(machines.own_memory("cpu"))
        with torch.device(machine.device):
            made = Transformer(model)
        fill_quickly(made)
        made.compute_dtype = machine.compute_dtype
        loss, _ = tryout.pick_loss(machine.device, machine.compute_dtype, model.vocab_size)
        made.fused_loss = loss == "fused"
        where = (shape_of(made, rows), machine.device, machine.compute_dtype)
        made.backend = pick_attention("auto", *where, deterministic)[0]
        super().__init__(cfg, made, machine, rows, deterministic)
        self.name = "compiled" if compiled else "eager"
        if self.moe:
            shape = (model.d_model, model.d_expert, model.n_experts, model.n_experts_per_token)
            place = (machine.device, machine.compute_dtype)
            picked, _ = tryout.pick_backend(backend, *place, *shape, self.tokens)
            for moe in self.moe:
                moe.backend = picked
            self.name = f"{picked}, {self.name}"
        if compiled:
            torch.compiler.config.recompile_limit = 64
            for block in made.blocks:
                block.compile()


@torch.no_grad()
def fill_quickly(model: Transformer) -> None:
    """Initial weights drawn on the device: init_weights draws on the CPU, which takes long for a
    billion numbers."""
    for name, p in model.named_parameters():
        if p.dim() < 2:
            p.fill_(1.0)
        elif "predictor" in name:
            p.zero_()
        else:
            p.normal_(0, model.cfg.init_std)


def batch(model: ModelConfig, rows: int, device, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and the ids after them: x, y (rows, T)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.vocab_size, (rows, model.max_seq_len + 1), generator=generator)
    return ids[:, :-1].contiguous().to(device), ids[:, 1:].contiguous().to(device)


def four_documents(x: torch.Tensor) -> Documents:
    """Of each row of x (rows, T), equally long."""
    rows, T = x.shape
    at = torch.arange(T, device=x.device)
    return Documents((at * 4 // T).expand(rows, T).contiguous(), 4)


class Peer:
    """The same step of transformers' Qwen3Moe or Qwen3: fused AdamW, fp32 masters, clipping, no
    router losses.

    precision: fp32; autocast (bf16 by torch.autocast); masters (a bf16 model beside fp32 weights in
    the optimizer).
    """

    def __init__(
        self,
        model: ModelConfig,
        machine,
        rows: int,
        compiled: bool = False,
        experts: str = "eager",
        precision: str = "fp32",
    ):
        import transformers

        kind = "Qwen3Moe" if model.n_experts else "Qwen3"
        config = getattr(transformers, f"{kind}Config")(**peer_keys(model))
        with torch.device(machine.device):
            self.model = getattr(transformers, f"{kind}ForCausalLM")(config).train()
        if model.n_experts:
            self.model.set_experts_implementation(experts)
        self.masters = list(self.model.parameters())
        if precision == "masters":
            self.masters = [p.detach().clone() for p in self.masters]
            self.model.bfloat16()
        self.params = list(self.model.parameters())
        self.precision, self.device = precision, machine.device
        if compiled:
            self.model.compile()
        words = [experts] if model.n_experts else []
        self.name = ", ".join([*words, precision, "compiled" if compiled else "eager"])
        betas = (0.9, 0.95)
        self.optimizer = torch.optim.AdamW(self.masters, 0.0, betas, weight_decay=0.1, fused=True)
        self.x, self.y = batch(model, rows, machine.device)
        self.tokens = rows * model.max_seq_len

    def __call__(self) -> torch.Tensor:
        torch.use_deterministic_algorithms(False)
        autocast = self.precision == "autocast"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            loss = self.model(input_ids=self.x, labels=self.y, shift_labels=self.y).loss
        loss.backward()
        if self.precision == "masters":
            for master, p in zip(self.masters, self.params):
                master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.precision == "masters":
            with torch.no_grad():
                torch._foreach_copy_(self.params, self.masters)
        return loss.detach()


def peer_keys(model: ModelConfig) -> dict:
    """Our shape in transformers' words."""
    keys = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.d_ff,
        "use_cache": False,
        "max_position_embeddings": model.max_seq_len,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if model.n_experts:
        keys["num_experts"] = model.n_experts
        keys["moe_intermediate_size"] = model.d_expert
        keys["num_experts_per_tok"] = model.n_experts_per_token
        keys["norm_topk_prob"] = model.norm_topk
        keys["output_router_logits"] = False
    return keys


# ---------------------------------------------------------------- an expert layer


def few_tiles(few: bool = True) -> None:
    """Triton's kernels with their smallest tile, which fits anywhere and needs no tuning: trying
    more takes dozens of compilations for every new number of experts. Not `few`: with all again."""
    for tuner in tuners():
        every = tuner.__dict__.setdefault("every_tile", tuner.configs)
        tuner.configs = [min(every, key=tile_size)] if few else every
        tuner.cache.clear()


def tuners() -> list:
    """The autotuned kernels; none where Triton cannot work."""
    if kernels.triton is None:
        return []
    found = []
    for kernel in vars(sys.modules["kernels_triton"]).values():
        while hasattr(kernel, "fn"):  # decorators around the function
            if hasattr(kernel, "configs") and hasattr(kernel, "cache"):
                found.append(kernel)
            kernel = kernel.fn
    return found


def tile_size(config) -> int:
    sizes = [n for n in config.kwargs.values() if type(n) is int]
    return math.prod(sizes) * config.num_stages


@contextlib.contextmanager
def poisoned(device):
    """What is handed out as empty memory is NaN, so that an output nobody wrote shows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        # blocks above 1 MiB and those up to it come from two pools
        large = torch.full((1 << 28,), math.nan, device=device)
        small = [torch.full((1 << 16,), math.nan, device=device) for _ in range(256)]
        del large, small
        yield
        return
    with tryout.as_in_the_run(deterministic=True):
        torch.utils.deterministic.fill_uninitialized_memory = True
        yield


def time_kernels(words: list[str]) -> int:
    """Forward, and forward + backward, of one expert layer with given routing; weights as the
    trainer has them, in fp32 and cast by the layer, and where that differs once more in the
    compute dtype, as others measure."""
    o = size_options(words, rounds=10)
    m = machines.detect(o.device)
    print(timing.machine_line(m))
    size = o.size or ("cuda" if m.device.type == "cuda" else "cpu")
    for shape in KERNELS[size]:
        for weights in dict.fromkeys((torch.float32, m.compute_dtype)):
            text = "T {}, d {}, I {}, E {}, K {}".format(*shape)
            print(f"{text}, x {m.compute_dtype}, weights {weights}", flush=True)
            try:
                time_expert_layer(m, shape, weights, o.rounds)
            except Exception as error:  # the next shape may work
                print(f"  left out: {timing.said(error)}")
            timing.forget_graphs()
    return 0


class LayerTimes(NamedTuple):
    """An expert layer by one backend, or `dense`: a SwiGLU of equal active width."""

    forward: list[float]  # seconds of each round
    both: list[float]  # with backward
    kept: int  # bytes for backward, weights aside
    flops: float  # of the forward pass


def time_expert_layer(m: machines.Machine, shape: tuple, weights: torch.dtype, rounds: int) -> None:
    """Prints what measure_expert_layer finds."""
    (T, C, I, _, K), b = shape, m.compute_dtype.itemsize
    formula = b * (T * C + 2 * T * K * I)  # bytes that should be kept
    layers = measure_expert_layer(m, shape, weights, rounds)
    dense = layers["dense"]
    for name, layer in layers.items():
        forward, both = min(layer.forward), min(layer.both)
        text = f"forward {human_number(layer.flops / forward, 'FLOP/s')}, {1e3 * forward:.2f} ms;"
        text += f" with backward {human_number(3 * layer.flops / both, 'FLOP/s')},"
        print(f"  {name:<10} {text} {1e3 * both:.2f} ms; keeps {layer.kept / 2**20:.1f} MiB")
        if name != "dense":
            against = timing.ratio(layer.forward, dense.forward)
            print(f"    time against dense: forward {against}")
            against = timing.ratio(layer.both, dense.both)
            share = layer.kept / formula
            print(f"    with backward {against}; kept is {share:.3f} of 2Td + 4TKI")


def measure_expert_layer(
    m: machines.Machine, shape: tuple, weights: torch.dtype, rounds: int
) -> dict[str, LayerTimes]:
    """By name, of one shape (T, d, I, E, K): first whether the backends agree (those that do not
    work are said and left out), then what each costs beside a dense SwiGLU."""
    (T, C, I, _, K), dtype = shape, m.compute_dtype
    (x, p, ids, w13, w2), dout = tryout.sample(m.device, dtype, *shape)
    w13, w2 = (w.detach().to(weights).requires_grad_() for w in (w13, w2))
    dense13 = torch.randn((2 * K * I, C), device=m.device, dtype=weights) * C**-0.5
    dense2 = torch.randn((C, K * I), device=m.device, dtype=weights) * (K * I) ** -0.5
    dense13, dense2 = dense13.requires_grad_(), dense2.requires_grad_()
    layers = {"dense": functools.partial(swiglu, x, dense13, dense2)}
    inputs = {"dense": [x, dense13, dense2]}
    for name, why in reversed(kernels.backends(m.device, dtype, C, I).items()):
        if why:
            print(f"  {name}: left out: ValueError: {why}")
            continue
        layers[name] = functools.partial(kernels.run_experts, x, p, ids, w13, w2, name)
        inputs[name] = [x, p, w13, w2]
    for name in disagreeing(layers, inputs, dout):
        del layers[name]

    def with_backward(name):
        return torch.autograd.grad(layers[name](), inputs[name], dout)

    both = {name: functools.partial(with_backward, name) for name in layers}
    forward = timing.interleaved(layers, rounds, m.device, 2)
    both = timing.interleaved(both, rounds, m.device, 2)
    flops = 6 * T * C * K * I
    found = {}
    for name, layer in layers.items():
        kept = kept_bytes(layer, [w13, w2, dense13, dense2])
        found[name] = LayerTimes(forward[name], both[name], kept, flops)
    return found


def swiglu(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """A dense FFN as the model has it: x (T, d), w13 (2 I, d), w2 (d, I), cast to x's dtype."""
    gate, up = F.linear(x, w13.to(x.dtype)).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w2.to(x.dtype))


def kept_bytes(run, leave_out: list[torch.Tensor]) -> int:
    """Bytes that the graph of run() keeps for backward, each storage once, without those of
    `leave_out`."""
    seen = {t.untyped_storage().data_ptr() for t in leave_out}
    sizes = []

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes.append(storage.nbytes())
        return t

    def unpack(t):
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = run()
    del y
    return sum(sizes)


def disagreeing(layers: dict, inputs: dict, dout) -> list[str]:
    """Says how far outputs and gradients of the backends are from the first's; returns those that
    fail."""
    failed, first = [], None
    for name, layer in layers.items():
        if name == "dense":
            continue
        try:
            y = layer()
            values = [y.detach(), *torch.autograd.grad(y, inputs[name], dout)]
        except Exception as error:  # somebody's kernel that does not work here
            print(f"  {name}: left out: {timing.said(error)}")
            failed.append(name)
            continue
        first = first or (name, values)
        errors = []
        for a, b in zip(values, first[1]):
            errors.append(((a.float() - b.float()).norm() / b.float().norm()).item())
        text = f"  {name}: differs from {first[0]} by {max(errors):.1e}"
        print(f"{text} (output and all gradients)", flush=True)
    return failed


# ---------------------------------------------------------------- attention


def attention_backends(dtype) -> dict:
    """name -> function of q (B, T, H, D), k and v (B, T, G, D): causal attention."""
    ways = {"torch's choice": attend}
    for name in kernels_attention.ATTENTION:
        ways[name] = functools.partial(kernels_attention.attention, backend=name, alone=True)
    if dtype == torch.float32 or not importlib.util.find_spec("flash_attn"):
        del ways["flash"]
    return ways


def auto_attention(machine, shape: tuple) -> dict:
    """What `attention: auto` takes for (B, T, H, G, D), and why."""
    B, T, H, G, D = shape
    run = Shape(B, {T: 1}, H, G, D)
    name, why = pick_attention("auto", run, machine.device, machine.compute_dtype)
    return {"value": name, "note": why}


def attend(q, k, v, backend=None) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa = k.shape[1] != q.shape[1]
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return y.transpose(1, 2)


def attention_inputs(device, dtype, shape: tuple) -> list[torch.Tensor]:
    """q, k, v and the output's gradient, of shape (B, T, H, G, D)."""
    B, T, H, G, D = shape
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for heads in (H, G, G, H):
        t = torch.randn(B, T, heads, D, generator=generator, device=device)
        made.append(t.to(dtype).requires_grad_())
    return made


def attention_fwd_bwd(way, q, k, v, dout) -> list[torch.Tensor]:
    y = way(q, k, v)
    return [y, *torch.autograd.grad(y, [q, k, v], dout)]


# ---------------------------------------------------------------- whole models


def time_steps(words: list[str]) -> int:
    """Our MoE and dense model and, in its fastest variant, transformers' of the same shapes: one
    training step."""
    import torch._inductor.config as inductor

    o = size_options(words, rounds=7, no_peer=False, limit=120.0)
    # a compilation that is given up must not go on beside the measurement
    inductor.compile_threads = 1
    m = machines.detect(o.device)
    print(timing.machine_line(m))
    peer = not o.no_peer and peer_is_there()
    shape, rows = STEP, 8
    if o.size == "toy":
        shape, rows = TOY, 2
    model = f"{shape['n_layers']} x {shape['d_model']}"
    for grain, (moe, d_ff) in GRAINS.items():
        print(f"{grain}; {model}, {rows} rows x {shape['max_seq_len']} tokens")
        built = {}
        for kind, keys in (("MoE", moe), ("dense", {})):
            cfg = ModelConfig(**shape | keys | {"d_ff": d_ff})
            tries = our_variants(cfg, m, rows)
            built[f"our {kind}"] = fastest(f"our {kind}", tries, o.limit, m.device)
            if peer:
                tries = peer_variants(cfg, m, rows)
                built[f"peer {kind}"] = fastest(f"peer {kind}", tries, o.limit, m.device)
        built = {name: made for name, made in built.items() if made is not None}
        with timing.Company() as company:
            times = timing.interleaved(built, o.rounds, m.device)
        print(f"  {company.said()}")
        for name, made in built.items():
            print(f"  {name:<10} {step_text(made, times[name])}")
        for a, b in PAIRS:
            if a in times and b in times:
                print(f"  {a} / {b}: time {timing.ratio(times[a], times[b])}")
        built = made = tries = None  # or the next grain has no room
        timing.forget_graphs()
    return 0


def our_variants(cfg: ModelConfig, m: machines.Machine, rows: int) -> list:
    """(label, function, compiled?): eager and compiled."""
    variants = []
    for compiled in (False, True):
        label = "compiled" if compiled else "eager"
        variants.append((label, functools.partial(Ours, cfg, m, rows, compiled), compiled))
    return variants


def step_text(made, times: list[float]) -> str:
    n, best = sum(p.numel() for p in made.model.parameters()), min(times)
    speed = human_number(made.tokens / best)
    text = f"{1e3 * best:.0f} ms, {speed} tokens/s at best; s {timing.spread(times)}"
    return f"{text}; {n:,} parameters; {made.name}"


def peer_is_there() -> bool:
    try:
        import transformers
    except ImportError:
        print("no peer: transformers is not installed")
        return False
    print(f"peer: transformers {transformers.__version__}")
    return True


def peer_variants(cfg: ModelConfig, m: machines.Machine, rows: int) -> list:
    """(label, function, compiled?) of every way to run transformers' model that fits here."""
    names, variants = [""], []
    if cfg.n_experts:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        names = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    precisions = ["fp32"]
    if m.device.type == "cuda" or machines.cpu_has_bf16():
        precisions += ["autocast", "masters"]
    # batched_mm copies the weights of its expert for every choice of every token, and keeps them
    # for backward
    choices = rows * cfg.max_seq_len * cfg.n_experts_per_token * cfg.n_layers
    copies = 4 * choices * 3 * cfg.d_model * cfg.d_expert
    for name in names:
        if name == "batched_mm" and copies > machines.total_memory(m.device) / 2:
            text = f"it would keep {copies / 2**30:.0f} GiB of copied weights"
            print(f"  peer MoE, {name}: left out: {text}")
            continue
        for precision in precisions:
            for compiled in (False, True):
                words = [name, precision, "compiled" if compiled else "eager"]
                make = functools.partial(Peer, cfg, m, rows, compiled, name, precision)
                variants.append((", ".join(filter(None, words)), make, compiled))
    return variants


def fastest(name: str, variants: list, limit: float, device):
    """Build each variant (a function) and time two of its steps; returns the fastest, still built,
    or None."""
    best, best_time = None, math.inf
    for label, make, compiled in variants:
        if compiled and (not limit or not machines.find_compiler()):
            continue
        made = None
        try:
            with timing.time_limit(limit if compiled else 600):
                made = make()
                loss = made().item()  # compiles, warms up
                times = timing.interleaved({"": made}, 2, device, warm_up=0)
            seconds = min(times[""])
            print(f"  {name}, {label}: {1e3 * seconds:.0f} ms, loss {loss:.4f}", flush=True)
            if seconds < best_time:
                best, best_time = made, seconds
        except Exception as error:  # somebody's code that does not work here is said, not fatal
            print(f"  {name}, {label}: left out: {timing.said(error)}", flush=True)
        made = None
        gc.collect()
    return best
