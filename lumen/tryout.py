"""Which backend of the expert layer, and of the loss, is right here, and the fastest: found by
trying them.

Each is compared with the plain formula of model_moe.py or model.py; experts are timed too, forward
and backward.
"""

from __future__ import annotations

import contextlib
import functools
import time

import torch

import kernels
from lumen.feed import synchronize
from lumen.launch import environment
from model import cross_entropy
from model_moe import plain_experts

# the largest error, relative to the largest value, that passes
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def sample(device, dtype, T, d, I, E, K, ids=None, seed=0):  # noqa: PLR0913 - the sizes
    """Random inputs of the experts' operator, [x, p, ids, w13, w2], and the output's gradient."""
    g = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*shape, std=1.0):
        return torch.randn(*shape, generator=g, device=device, dtype=wide) * std

    if ids is None:
        ids = torch.rand(T, E, generator=g, device=device).topk(K, -1)[1]
    x, dout = randn(T, d).to(dtype), randn(T, d).to(dtype)
    p = randn(T, K).softmax(-1)
    w13, w2 = randn(E, 2 * I, d, std=d**-0.5), randn(E, d, I, std=I**-0.5)
    inputs = [t.requires_grad_(t.is_floating_point()) for t in (x, p, ids, w13, w2)]
    return inputs, dout


def hard_ids(device, T: int, E: int, K: int) -> torch.Tensor:
    """Routing (T, K) with what spare slots and dropped tokens bring: up to two experts get no
    token, and every 16th token has a choice that goes to none (E)."""
    g = torch.Generator(device).manual_seed(1)
    score = torch.rand(T, E, generator=g, device=device)
    for idle in (0, E - 1)[: E - K]:
        score[:, idle] = -1
    ids = score.topk(K, -1)[1]
    ids[15::16, -1] = E
    return ids


def on_used_memory(step):
    """step(), with NaN in the memory that its results are likely to get: what a kernel does not
    write shows."""
    for result in step():
        result.detach().fill_(torch.nan)
    return step()


def fwd_bwd(f, inputs, dout):
    """f(*inputs) and its gradients to x, p, w13, w2."""
    out = f(*inputs)
    return out, *torch.autograd.grad(out, [t for t in inputs if t.requires_grad], dout)


@contextlib.contextmanager
def as_in_the_run(deterministic: bool):
    """Deterministic algorithms as the run will have them: under them torch has no cuDNN attention,
    flash is slower, and Triton's tiles are not tuned."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def best_time(f, device) -> float:
    """Seconds of f(), the best of five after one to warm up; of fewer where those took 0.3 s."""

    def run() -> float:  # it waits, so that the warm-up is not in the first time
        begin = time.perf_counter()
        f()
        synchronize(device)
        return time.perf_counter() - begin

    run()
    times = [run()]
    while len(times) < 5 and sum(times) <= 0.3:
        times.append(run())
    return min(times)


def selftest(device, dtype, T, d, I, E, K, timed=True, ids=None, names=None):  # noqa: PLR0913
    """{backend: (error, seconds)}: the largest error of out and the four gradients, relative to
    each one's maximum, against the plain formula in fp32; seconds of forward and backward, inf
    where `timed` is false. A backend that raises has inf of both. Without `ids`: hard_ids."""
    if ids is None:
        ids = hard_ids(device, T, E, K)
    inputs, dout = sample(device, dtype, T, d, I, E, K, ids)
    wide = torch.promote_types(dtype, torch.float32)
    exact = [inputs[0].detach().to(wide).requires_grad_(), *inputs[1:]]
    want = fwd_bwd(plain_experts, exact, dout.to(wide))
    if names is None:
        names = [
            name for name, reason in kernels.backends(device, dtype, d, I).items() if not reason
        ]
    results = {}
    for name in names:
        error = seconds = float("inf")
        layer = functools.partial(kernels.run_experts, backend=name)
        step = functools.partial(fwd_bwd, layer, inputs, dout)
        try:
            error = relative_error(on_used_memory(step), want)
            if timed:
                seconds = best_time(step, device)
        except Exception as e:  # a compiler that fails, no memory: the others can still serve
            first = str(e).partition("\n")[0]
            print(f"experts: {kernels.versioned(name)} failed: {type(e).__name__}: {first}")
            error = float("inf")
        results[name] = error, seconds
    return results


def relative_error(got, want) -> float:
    errors = []
    for g, w in zip(got, want):
        errors.append((g.to(w.dtype) - w).abs().max() / w.abs().max().clamp(min=1e-30))
    error = torch.stack([e.float() for e in errors]).max().item()
    return error if error == error else float("inf")  # a NaN


def tuning_text() -> str:
    return kernels.kernels_triton.tuning_text()


def pick_backend(choice: str, device, dtype, d, I, E, K, T) -> tuple[str, str]:  # noqa: PLR0913
    """-> (backend, why): choice itself if it can work here, for auto the fastest one that passes
    the self-test.

    ValueError with reason and remedy for a choice that cannot work. On CPU auto tries a small
    layer, at most about a second; on CUDA the first call also compiles and tunes Triton's kernels,
    which rank 0 says.
    """
    known = kernels.backends(device, dtype, d, I)
    on_cuda = torch.device(device).type == "cuda"
    if choice != "auto":
        if choice not in known:
            raise ValueError(f"experts: backend {choice!r} is not one of auto, {', '.join(known)}")
        if known[choice]:
            text = f"cannot work here: {known[choice]}; or let auto choose"
            raise ValueError(f"experts: backend {choice} {text}")
        if choice == "triton" and on_cuda:
            return choice, f"as asked; the first step tunes it: {tuning_text()}"
        return choice, "as asked"
    candidates = [name for name, reason in known.items() if not reason]
    if kernels.INTERPRET and "triton" in candidates:
        candidates.remove("triton")
    left_out = [f"no {name}: {reason}" for name, reason in known.items() if reason]
    if len(candidates) == 1:
        return candidates[0], "; ".join(["the only one that can work here", *left_out])
    if torch.device(device).type == "cpu":
        # fewer experts with as many rows each, at most 3 GFLOP
        few = max(K, min(E, 8))
        T = max(1, min(T, 2048, int(3e9 / (18 * d * I * K))) * few // E)
        E = few
    if on_cuda and "triton" in candidates and environment("RANK", 0) == 0:
        print(f"experts    tuning Triton's kernels: {tuning_text()}", flush=True)
    # so many that experts have rows enough to be tuned for what the run itself will ask
    T = min(T, max(8192, 256 * E // K + 1))
    results = selftest(device, dtype, T, d, I, E, K, names=candidates)
    passed = {k: seconds for k, (error, seconds) in results.items() if error < TOLERANCE[dtype]}
    best = min(passed, key=passed.get, default="slices")
    tried = []
    for name, (error, seconds) in results.items():
        tried.append(f"{kernels.versioned(name)} {seconds * 1e3:.1f} ms error {error:.0e}")
    return best, "; ".join([", ".join(tried), *left_out])


def pick_loss(device, dtype, V: int) -> tuple[str, str]:
    """-> (fused | plain, why): how model.HeadLoss makes a loss of logits over V ids.

    fused is Triton's kernel: it reads the logits twice, where the plain formula goes over them a
    dozen times. Tried on a few tokens; where it fails or disagrees the formula is taken.
    """
    reason = kernels.no_triton(torch.device(device), dtype)
    if reason or kernels.INTERPRET:
        return "plain", reason or "Triton's interpreter is for tests"
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(64, V, generator=g)).to(device, dtype)
    targets = torch.randint(V, (64,), generator=g).to(device)
    targets[::7] = -1
    try:
        error = error_of_fused_loss(logits, targets)
        if not error <= TOLERANCE[dtype]:  # so written that a NaN fails too
            raise RuntimeError(f"differs from the plain formula by {error:.1e}")
    except Exception as e:  # a compiler can fail in any way, and must stop no run
        first = str(e).strip().split("\n")[0][:120]
        return "plain", f"the kernel does not work here ({type(e).__name__}: {first})"
    return "fused", f"{kernels.versioned('triton')}, error {error:.0e}"


def error_of_fused_loss(logits, targets) -> float:
    """The largest of the sums (relative) and the gradient, with z-loss; logits (n, V) stay."""
    from kernels_triton import cross_entropy as fused  # there is Triton: no_triton has looked

    want, p = cross_entropy(logits.clone(), targets, 1e-3, True)
    got, q = fused(logits.clone(), targets, 1e-3, True)
    errors = [(got[:2] / want[:2] - 1).abs().max(), (q.float() - p).abs().max()]
    return torch.stack(errors).max().item()  # NaN where one is
