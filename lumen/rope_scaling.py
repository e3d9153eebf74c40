"""RoPE for longer contexts than a model was trained on, by the formulas of transformers: linear
(divide by factor), llama3 (Llama 3.1's smooth cut), yarn (Peng et al. 2023). Imported models have
it; model.py's rope_tables() asks for it only where `rope_scaling` says so."""

from __future__ import annotations

import math

import torch

from model import ModelConfig, rope_kind


def scaled(cfg: ModelConfig, freq: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The frequencies (D/2,) as rope_scaling has them, and the gain on cos and sin, so on queries
    and keys alike."""
    scaling = cfg.rope_scaling
    formula = {"linear": linear, "llama3": llama3, "yarn": yarn}[rope_kind(scaling)]
    return formula(cfg, scaling, freq)


def linear(cfg: ModelConfig, scaling: dict, freq: torch.Tensor) -> tuple[torch.Tensor, float]:
    return freq / scaling["factor"], 1.0


def llama3(cfg: ModelConfig, scaling: dict, freq: torch.Tensor) -> tuple[torch.Tensor, float]:
    # turns that a frequency makes over the original context: many stay, few are slowed
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as trained, 0: slowed by factor
    return freq * (keep + (1 - keep) / scaling["factor"]), 1.0


def yarn(cfg: ModelConfig, scaling: dict, freq: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What turns often over the context it was trained on stays, what turns less than once is
    slowed by factor, a ramp lies between."""
    D = cfg.head_dim
    context = scaling.get("original_max_position_embeddings") or cfg.max_seq_len

    def dimension(turns):  # the one whose frequency makes so many turns over the context
        return D * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low = max(math.floor(dimension(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(dimension(scaling.get("beta_slow", 1))), D - 1)
    pair = torch.arange(D // 2, device=freq.device, dtype=torch.float32)
    keep = 1 - ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    gain = scaling.get("attention_factor") or 0.1 * math.log(max(scaling["factor"], 1.0)) + 1.0
    return freq * (keep + (1 - keep) / scaling["factor"]), gain
