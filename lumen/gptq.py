"""GPTQ (Frantar et al. 2022): few bits for a matrix so that what it computes of real inputs changes
least, not its numbers.

Columns are rounded one after the other, and the error of each is made up for by those that are not
rounded yet, by the inverse of H = X^T X over the inputs X (N, k) that the layer sees. Block after
block: a block sees what the quantised ones before it let through. Of its own matrices all see the
block as it was, so that the rows pass twice, not five times.

Experts: each by the tokens that are routed to it; one with fewer than LEAST is rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from lumen import fewbits
from lumen.quantize import Packed, QuantExperts, QuantLinear, convertible, pack, put
from model import AttentionInputs, Transformer, rope_tables
from model_moe import Experts

DAMPING = 0.01  # of H's mean diagonal, added to it
LEAST = 128  # inputs that a matrix needs
STRIP = 128  # columns whose errors are handed on together

# ---------------------------------------------------------------- a matrix


def gptq(weight: torch.Tensor, H: torch.Tensor, kind: str, act_order: bool = False) -> Packed:
    """weight (n, k) in fp32 and H (k, k), X^T X of its inputs, which is used up -> int8 or int4.

    act_order: columns of large inputs first; groups stay where they are.
    """
    n, k = weight.shape
    plain = pack(weight, kind)
    scale = plain.scale  # (n,); int4: (n, groups)
    group = fewbits.group_of(k) if kind == "int4" else k
    per_row = scale.view(n, -1)
    low, high = (-127, 127) if kind == "int8" else (-8, 7)
    work = weight.clone()
    order = H.diagonal().argsort(descending=True) if act_order else torch.arange(k)
    work, H = work[:, order], H[order][:, order]
    unseen = H.diagonal() == 0  # inputs that are always 0 change nothing
    H.diagonal()[unseen] = 1.0
    inverse = inverse_factor(H)
    made = torch.empty_like(work)  # whole numbers
    for begin in range(0, k, STRIP):
        end = min(k, begin + STRIP)
        strip = work[:, begin:end]
        factor = inverse[begin:end, begin:end]
        errors = torch.empty_like(strip)
        for i in range(end - begin):
            column = strip[:, i]
            place = int(order[begin + i])
            s = per_row[:, place // group]
            q = (column / torch.where(s == 0, 1.0, s)).round_().clamp_(low, high)
            made[:, begin + i] = q
            errors[:, i] = (column - q * s) / factor[i, i]
            # a rank-1 update of what comes after it in the strip
            strip[:, i + 1 :].addr_(errors[:, i], factor[i, i + 1 :], alpha=-1)
        work[:, end:].addmm_(errors, inverse[begin:end, end:], alpha=-1)
    q = torch.empty_like(made)
    q[:, order] = made
    if kind == "int8":
        return Packed(kind, plain.shape, q.to(torch.int8), scale)
    q = F.pad(q + 8, (0, -k % group), value=8)
    return Packed(kind, plain.shape, fewbits.join(q.to(torch.uint8)), scale)


def inverse_factor(H: torch.Tensor) -> torch.Tensor:
    """U, upper, of which U^T U is (H + damping)^-1. More damping where H is too near singular."""
    damping = DAMPING * H.diagonal().mean()
    for _ in range(5):
        H.diagonal().add_(damping)
        lower, wrong = torch.linalg.cholesky_ex(H)
        if not wrong:
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        damping = damping * 10
    raise FloatingPointError("the inputs of a layer are not finite")


# ---------------------------------------------------------------- what a block's layers see


class Seen:
    """The inputs of a matrix: H = X^T X, and how many they were."""

    def __init__(self, k: int):
        self.H, self.n = torch.zeros(k, k), 0

    def add(self, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        self.H.addmm_(x.t(), x)
        self.n += len(x)


class Watch:
    """Forward hooks on the layers of a block that are to be quantised."""

    def __init__(self, layers: dict[str, nn.Module]):
        self.linear: dict[str, Seen] = {}
        self.routed: dict[str, list] = {}  # of experts: [(x (T, C), ids (T, K))], a pass each
        self.handles = []
        for path, layer in layers.items():
            if isinstance(layer, Experts):
                self.routed[path] = []
                hook = self.hear_experts(self.routed[path])
            else:
                self.linear[path] = Seen(layer.in_features)
                hook = self.hear(self.linear[path])
            self.handles.append(layer.register_forward_pre_hook(hook))

    @staticmethod
    def hear(seen: Seen):
        return lambda layer, given: seen.add(given[0])

    @staticmethod
    def hear_experts(rows: list):
        return lambda layer, given: rows.append((given[0].clone(), given[2].clone()))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


# ---------------------------------------------------------------- a model


@dataclass
class Report:
    """What was rounded to the nearest for want of inputs, and the inputs of all."""

    nearest: list[str] = field(default_factory=list)
    experts: int = 0
    starved: int = 0  # experts among `nearest`
    tokens: int = 0

    def __str__(self) -> str:
        text = f"GPTQ on {self.tokens:,} tokens"
        if self.starved:
            few = f"{self.starved} of {self.experts} experts saw fewer than {LEAST} tokens"
            text += f"; {few}: rounded to nearest"
        others = len(self.nearest) - self.starved
        return text + (f"; {others} matrices, too, saw too few" if others else "")


@torch.no_grad()
def quantize(
    model: Transformer, kind: str, rows: torch.Tensor, say, act_order: bool = False
) -> Report:
    """As lumen.quantize.quantize does it, by GPTQ. rows (B, T): ids; model: in fp32, on the CPU.
    FloatingPointError: what the model computes of them is not finite."""
    report = Report(tokens=rows.numel())
    model.eval()
    stream = F.embedding(rows, model.embed.weight)  # (B, T, C)
    pos = torch.arange(rows.shape[1])
    inputs = [AttentionInputs(rope_tables(model.cfg, pos), pos=pos) for _ in stream]
    paths = convertible(model)
    for number, block in enumerate(model.blocks):
        own = [path for path in paths if path.startswith(f"blocks.{number}.")]
        watch = Watch({path: model.get_submodule(path) for path in own})
        for row, told in zip(stream, inputs):
            block(row[None], told)
        watch.close()
        for path in own:
            layer = model.get_submodule(path)
            if isinstance(layer, Experts):
                packed = experts(path, layer, watch.routed.pop(path), kind, act_order, report)
                put(model, path, QuantExperts(layer, kind, packed))
            else:
                seen = watch.linear.pop(path)
                packed = matrix(path, layer.weight.detach(), seen, kind, act_order, report)
                put(model, path, QuantLinear(layer.weight, kind, packed))
        for i, row in enumerate(stream):
            change, stats = block(row[None], inputs[i])
            if "first" in stats:  # of lumen/extras.py; a copy, for the row is added to in place
                inputs[i] = inputs[i]._replace(first=tuple(t.clone() for t in stats["first"]))
            row += change[0]
        say(f"gptq       block {number + 1} of {len(model.blocks)}")
    return report


def matrix(path: str, weight, seen: Seen, kind: str, act_order: bool, report: Report) -> Packed:
    if seen.n < LEAST:
        report.nearest.append(path)
        return pack(weight, kind)
    return gptq(weight, seen.H, kind, act_order)


def experts(
    path: str, layer: Experts, rows: list, kind: str, act_order: bool, report: Report
) -> dict[str, Packed]:
    """Expert by expert, so that no more than one's H is there at a time."""
    made = {"w13": [], "w2": []}
    for e in range(len(layer.w2)):
        w13, w2 = layer.w13[e].detach(), layer.w2[e].detach()
        outer, inner = Seen(w13.shape[1]), Seen(w2.shape[1])
        for x, ids in rows:
            x = x[(ids == e).any(1)]
            gate, up = F.linear(x, w13).chunk(2, -1)
            outer.add(x)
            inner.add(F.silu(gate) * up)
        report.experts += 1
        if outer.n < LEAST:
            report.starved += 1
            report.nearest.append(f"{path}.{e}")
            made["w13"].append(pack(w13, kind))
            made["w2"].append(pack(w2, kind))
            continue
        made["w13"].append(gptq(w13, outer.H, kind, act_order))
        made["w2"].append(gptq(w2, inner.H, kind, act_order))
    return {name: stacked(each) for name, each in made.items()}


def stacked(each: list[Packed]) -> Packed:
    q, scale = (torch.stack(parts) for parts in zip(*((p.q, p.scale) for p in each)))
    return Packed(each[0].kind, (len(each), *each[0].shape), q, scale)
