"""A Lumen model as lm-eval knows models: `lumen` in its registry. Imports lm-eval, which is
optional: whoever wants this goes by lumen/harness.py.

A request's log-probability depends on the requests of its own question alone (one task, one
document, one context, asked together), not on batch size, order, limit or other tasks. Text never
becomes a control token: those of a chat template travel through lm-eval's strings behind MARK.
"""

from __future__ import annotations

import re
from functools import cached_property
from itertools import groupby

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lumen import chat
from lumen.errors import UserError
from lumen.questions import Asked
from lumen.sampling import Sampling
from lumen.stream import Stream, decode

MARK = "\U000f57a1"  # of a private plane: before the name of a control token
DEFAULT_NEW_TOKENS = 256  # lm-eval's, of tasks that name none
AT_ONCE = 8  # prompts, where the text does not depend on it
SAMPLED = ("top_k", "top_p", "min_p", "repetition_penalty")  # as lumen/sampling.py's
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1}  # what others write and we do anyway


class Shown(Stream):
    """A stream without the names of control tokens, as transformers decodes for lm-eval."""

    def text_of(self, token: int) -> str:
        if token in self.tokenizer.controls.values():
            return ""
        return super().text_of(token)


@register_model("lumen")
class LumenLM(TemplateLM):
    """What lm-eval asks for: log-probabilities, rolling ones, text.

    prefix: the id before a text that has no context; None: end-of-text. A folder of Hugging Face's
    has its bos_token there, and lm-eval's hf model takes that.
    """

    def __init__(self, asked: Asked, prefix: int | None = None):
        super().__init__()
        self.asked, self.prefix = asked, prefix
        self.chatting = False  # a chat template was applied: strings may hold MARKs of ours
