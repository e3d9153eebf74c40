"""Attention as Lunaris Codex has it: two variants that train and take over its checkpoints
(tools/import_lunaris.py). No Hugging Face class has them, so they do not export."""

from __future__ import annotations

from model import Attention, AttentionInputs, ModelConfig, RMSNorm, rotate


class LunarisAttention(Attention):
    """rope_first: QK-norm after RoPE. norm_order lunaris: QK-norm over whole vectors."""

    def __init__(self, cfg: ModelConfig, layer: int = 0):
        super().__init__(cfg, layer)
        if cfg.norm_order == "lunaris":
            self.q_norm = RMSNorm(self.sizes[0], cfg.norm_eps)
            self.k_norm = RMSNorm(self.sizes[1], cfg.norm_eps)

    def norm_and_rotate(self, q, k, inputs: AttentionInputs):
        """q (B, T, H, D) and k (B, T, G, D) -> the same shapes."""
        if self.cfg.norm_order == "lunaris":
            # over all heads at once, as its code does, and not per head
            q = self.q_norm(q.flatten(2)).view_as(q)
            k = self.k_norm(k.flatten(2)).view_as(k)
            return rotate(q, inputs.rope), rotate(k, inputs.rope)
        q, k = rotate(q, inputs.rope), rotate(k, inputs.rope)
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k
