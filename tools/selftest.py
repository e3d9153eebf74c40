"""python -m tools.selftest: how right and how fast each backend of the expert layer is here.

Against the plain formula in model_moe.py, on the cases that expert layers elsewhere got wrong and
then on whole layers, beside a dense SwiGLU of equal active width. It is the first thing to run on a
GPU that nobody has had.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import INTERPRET, backends
from lumen.launch import Words, command
from lumen.tryout import TOLERANCE, best_time, fwd_bwd, sample, selftest

SHAPES = {  # T, d, I, E, K
    "cpu": [(4096, 384, 512, 8, 2), (4096, 384, 64, 64, 8)],
    "cuda": [(32768, 1536, 512, 128, 10)],
}


def edge_cases() -> list[tuple]:
    """(name, (T, d, I, E, K), ids or None) of what expert layers elsewhere got wrong."""
    g = torch.Generator().manual_seed(1)
    dead = torch.rand(40, 6, generator=g).index_fill(1, torch.tensor([3]), -1).topk(2, -1)[1]
    tail = torch.rand(33, 5, generator=g).topk(2, -1)[1]  # ids 4: no expert
    return [
        ("an expert without tokens", (40, 32, 24, 6, 2), dead),
        ("all tokens to one expert", (40, 32, 24, 4, 1), torch.full((40, 1), 2)),
        ("one expert", (17, 16, 16, 1, 1), None),
        ("every expert", (17, 16, 16, 4, 4), None),
        ("one token", (1, 16, 16, 4, 2), None),
        ("sizes off the tile", (37, 40, 56, 5, 3), None),
        ("slots without expert", (33, 32, 24, 4, 2), tail),
        ("no slot with an expert", (9, 16, 16, 3, 2), torch.full((9, 2), 3)),
    ]


def dense_swiglu(x, w13, w2):
    """What as many expert rows would cost as one dense layer."""
    gate, up = F.linear(x, w13[0].to(x.dtype)).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w2[0].to(x.dtype))


def check_case(device: str, dtype, name: str, shape: tuple, ids) -> bool:
    """One line with the errors of all backends; whether all are right."""
    if ids is not None:
        ids = ids.to(device)
    results = selftest(device, dtype, *shape, timed=False, ids=ids)
    errors = {backend: error for backend, (error, _) in results.items()}
    print(f"{name:26}" + "".join(f"  {backend} {error:.0e}" for backend, error in errors.items()))
    return all(error < TOLERANCE[dtype] for error in errors.values())


def time_shape(device: str, dtype, shape: tuple) -> bool:
    """A line for each backend at one shape; whether all are right."""
    T, d, I, E, K = shape
    (x, _, _, w13, w2), dout = sample(device, dtype, T, d, K * I, 1, 1)
    dense = best_time(lambda: fwd_bwd(dense_swiglu, [x, w13, w2], dout), device)
    text = f"dense SwiGLU of width {K * I} {dense * 1e3:.1f} ms forward and backward"
    print(f"T {T} d {d} I {I} E {E} K {K}: {text}")
    if INTERPRET:  # times of an emulator say nothing
        return True
    good = True
    for backend, (error, seconds) in selftest(device, dtype, *shape).items():
        good &= error < TOLERANCE[dtype]
        ratio = f"{seconds / dense:.2f} x dense"
        print(f"  {backend:12}{seconds * 1e3:8.1f} ms  {ratio}  error {error:.0e}")
    return good


def report(cases=None, shapes=None) -> int:
    """Prints all of it; 0 if every backend that can work here is right."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'CPU'}, {dtype}")
    for backend, reason in backends(device, dtype, 384, 512).items():
        print(f"{backend:12}{'can work' if reason is None else 'cannot: ' + reason}")
    good = True
    for case in cases or edge_cases():
        good &= check_case(device, dtype, *case)
    for shape in shapes or SHAPES[device]:
        good &= time_shape(device, dtype, shape)
    print("passed" if good else "FAILED")
    return 0 if good else 1


def main(argv: list[str]) -> int:
    Words(prog="tools.selftest", description=__doc__.partition("\n")[0]).parse_args(argv)
    return report()


if __name__ == "__main__":
    command(main)
