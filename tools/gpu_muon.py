"""The part `muon` of tools/gpu.py: is an update of Muon the CPU's, does a step wait for the device,
does a run resume to the same bytes, and what share of a step it takes."""

from __future__ import annotations

import dataclasses

import torch

from lumen import muon
from lumen.optim import build_optimizer
from tools import timing
from tools.gpu_parts import GPT2, Here, build, check_bytes, try_window

SHAPES = {"wide": (768, 3072), "tall": (3072, 768), "experts": (8, 512, 384)}
TOYS = {"wide": (24, 40), "tall": (40, 24), "experts": (3, 16, 24)}
# of 2^-8 and 2^-23, which five steps of coefficients up to 22 amplify
LIMITS = {torch.bfloat16: 0.1, torch.float32: 1e-3}


def muon_part(here: Here) -> None:
    for dtype, most in LIMITS.items():
        for name, shape in here.pick(SHAPES, TOYS).items():
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            attempt = here.rows.attempt
            attempt(label, update_error, here, shape, dtype, unit="relative error", most=most)
    try_window(here, "muon", {}, {"optimizer": "muon"})
    check_bytes(here, "muon", only=("stopped and resumed",), optimizer="muon")
    here.rows.attempt("124M, 16 rows, eager: muon", share, here, unit="of adamw's step")


def update_error(here: Here, shape: tuple, dtype) -> float:
    """Of what is orthogonalised on the device, off fp32 on the CPU."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = muon.orthogonalise(g)
    found = muon.orthogonalise(g.to(here.device, dtype)).float().cpu()
    return ((found - wanted).norm() / wanted.norm()).item()


def share(here: Here) -> dict:
    """The seconds that a step takes more than AdamW's, as a share of that; in turns."""
    runs = {name: build(here, GPT2, 16, compiled=False) for name in ("adamw", "muon")}
    run = runs["muon"]
    run.cfg = dataclasses.replace(run.cfg, optimizer="muon")
    named = dict(run.model.named_parameters())
    run.optimizer = build_optimizer(run.cfg, named, here.machine.precision)
    seconds = timing.interleaved(runs, here.pick(8, 1), here.device, here.pick(3, 1))
    least = {name: min(times) for name, times in seconds.items()}
    row = {"value": least["muon"] / least["adamw"] - 1, "ms": 1e3 * least["muon"]}
    return row | {"tokens a step": run.tokens}
