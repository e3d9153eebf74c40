"""Keys and values in int8: a cache of about half the bytes of bf16, a quarter of those of fp32.

Each vector (of a token, a key head, a layer) has a scale of its own, the largest number in it over
127, in bf16; what is read is scale q. So D numbers take D + 2 bytes, where bf16 takes 2 D. The
scale is rounded to bf16 first, which leaves q within 127 and the error of a number within half a
step. What a vector becomes depends on it alone: neither on how a prompt was cut into chunks, nor on
other rows.

A layer's keys and values are made whole again for each pass over them: it saves memory, not time.
What it costs in bits per byte, and in time: python -m lumen.kv_int8 MODEL TEXT_FILE.
"""

from __future__ import annotations

import torch

from model import KVCache, ModelConfig

CACHES = ("full", "int8")  # of --kv; full: in the dtype that the model computes in


def store(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., D) as q int8 (..., D) and scale bf16 (..., 1)."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / 127).bfloat16()
    # a vector of zeros has scale 0
    q = (x / scale.float().clamp(min=1e-38)).round_().to(torch.int8)
    return q, scale


def load(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers, scale q, rounded once: torch multiplies int8 and bf16 in fp32, which holds
    their product exactly."""
    return q.to(dtype).mul_(scale)


class Int8Rows:
    """What stands for a tensor (B, G, T, D) of keys or values. Parts of it are views, as a tensor's
    are; they are written with numbers, or with such parts, bit for bit; `to` gives the numbers."""

    def __init__(self, q: torch.Tensor, scale: torch.Tensor):
        self.q, self.scale = q, scale

    def __getitem__(self, index) -> Int8Rows:
        """index: of tokens, never within a vector."""
        return Int8Rows(self.q[index], self.scale[index])

    def __setitem__(self, index, value) -> None:
        if isinstance(value, torch.Tensor):
            value = Int8Rows(*store(value))
        if isinstance(value, Int8Rows):
            self.q[index], self.scale[index] = value.q, value.scale
        else:  # 0.0
            self.q[index] = self.scale[index] = value

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        return load(self.q, self.scale, dtype)

    def n_bytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes


class Int8Cache(KVCache):
    """A KVCache whose keys and values are int8; those that attention gets are in `dtype`."""

    def __init__(self, cfg: ModelConfig, batch: int, length: int, device=None, dtype=torch.float32):
        super().__init__(cfg, batch, 0, device, dtype)  # without tokens: their place comes here
        self.length, self.dtype = length, dtype
        shape = (batch, cfg.n_kv_heads, length + 1)

        def zeros() -> Int8Rows:
            q = torch.zeros(*shape, cfg.head_dim, device=device, dtype=torch.int8)
            return Int8Rows(q, torch.zeros(*shape, 1, device=device, dtype=torch.bfloat16))

        self.k = [zeros() for _ in range(cfg.n_layers)]
        self.v = [zeros() for _ in range(cfg.n_layers)]
        for i in self.kept:
            self.kept[i] = torch.zeros(batch, length + 1, dtype=torch.bool, device=device)

    def write(self, layer: int, pos: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        """As KVCache.write: all that the layer has, in numbers."""
        k, v = super().write(layer, pos, k, v)
        return k.to(self.dtype), v.to(self.dtype)


def use(model, kv: str) -> None:
    """The model makes its caches of this kind, one of CACHES, from now on."""
    model.cache_type = Int8Cache if kv == "int8" else KVCache
