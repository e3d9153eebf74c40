"""The training modes of LuminaAI, written out as `data`: what they say, in Lumen's own keys.

    training_mode: base_only | finetuning_only | hybrid_sequential | hybrid_interleaved
    base_paths, finetuning_paths: folders that prepare_data.py has made (or files, for base_only)
    base_ratio: 0.7, of rows that are base; mix_strategy: ratio | alternating | random
"""

from __future__ import annotations

KEYS = ("training_mode", "base_paths", "finetuning_paths", "base_eval_paths")
KEYS += ("finetuning_eval_paths", "base_ratio", "mix_strategy", "base_epochs", "finetuning_epochs")
KEYS += ("curriculum_aggressiveness",)


def expand_modes(tree: dict, place, notes: list[str], wrong: list[str]) -> None:
    """Put `data` in the place of the keys above, in `tree`; notes say what it is. What cannot be
    honoured goes to `wrong`."""
    raise NotImplementedError
