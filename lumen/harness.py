"""lm-eval's tasks in this process: `python evaluate.py RUN --lm_eval A,B [--lm_eval_path DIR]`.

`python -m lumen.harness run --model lumen --model_args path=out/run --tasks A` is lm-eval's own
command line with our models in it. lm-eval is optional: requirements-eval.txt. Tasks of one's own
(YAML and files) need no network; what lm-eval brings names data on Hugging Face's hub.
"""

from __future__ import annotations

from lumen.questions import Asked


def language_model(asked: Asked, prefix: int | None = None):
    """The model as an lm_eval.api.model.LM; prefix: see LumenLM. E003: there is no lm-eval."""
    raise NotImplementedError


def run(asked: Asked, tasks: list[str], include_path=None, prefix=None, **how) -> dict:
    """What lm_eval.simple_evaluate returns. include_path: a folder of YAML tasks; how: its further
    arguments (num_fewshot, limit, apply_chat_template, gen_kwargs ...). E003; E127: no such task,
    its data are not here, or it asks what the model cannot do."""
    raise NotImplementedError


def rows(results: dict, seconds: float | None = None) -> list:
    """lumen.scores.Score of every metric of every task and group, the first of each the
    headline."""
    raise NotImplementedError
