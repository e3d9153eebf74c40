"""lm-eval's tasks in this process: `python evaluate.py RUN --lm_eval A,B [--lm_eval_path DIR]`.

`python -m lumen.harness run --model lumen --model_args path=out/run --tasks A` is lm-eval's own
command line with our models in it. lm-eval is optional: requirements-eval.txt. Tasks of one's own
(YAML and files) need no network; those that lm-eval brings name data on Hugging Face's hub.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections import Counter

from lumen.errors import UserError, expand, nearest
from lumen.questions import Asked
from lumen.scores import Score, verdict

RESAMPLES = 1000  # where a metric's error has no formula; lm-eval's 100,000 take minutes


def need() -> None:
    """E003: there is no lm-eval."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        text = f"lm-eval's tasks: pip install 'lm-eval>=0.4.9,<0.5' ({error})"
        raise UserError("E003", text) from error


def language_model(asked: Asked, opened=None):
    """The model as an lm_eval.api.model.LM. opened: the lumen.models.Opened that it comes from; one
    from Hugging Face begins texts as it does there. E003: there is no lm-eval."""
    need()
    from lumen.lm_eval_model import LumenLM, prefix_of

    return LumenLM(asked, opened and prefix_of(opened))


def run(asked: Asked, tasks: list[str], include_path=None, opened=None, **how) -> dict:
    """What lm_eval.simple_evaluate returns. include_path: a folder of YAML tasks; how: its further
    arguments (num_fewshot, limit, apply_chat_template, gen_kwargs ...). E003; E127: no such task,
    its data are not here, or it asks what the model cannot do."""
    model = language_model(asked, opened)
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate

    manager = find(tasks, include_path)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it would fork a process that has threads
    how = {"bootstrap_iters": RESAMPLES, **how}
    try:
        return simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **how)
    except (OSError, DatasetsError) as error:
        text = f"lm-eval, {', '.join(tasks)}: its data: {str(error).strip()[:300]}"
        fix = "what lm-eval brings is on huggingface.co; a YAML of your own reads local files"
        raise UserError("E127", f"{text}\n  {fix} (dataset_path: json)") from error
    except (TemplateError, ValueError) as error:  # a field that rows lack, more shots than rows
        text = f"lm-eval, {', '.join(tasks)}: it cannot be asked: {type(error).__name__}: {error}"
        raise UserError("E127", text) from error


def find(tasks: list[str], include_path):
    """lm-eval's TaskManager of the folder, with its own tasks only where that lacks one: to index
    them takes seconds. E127: a task that there is not."""
    from lm_eval.tasks import TaskManager

    folder = expand(str(include_path)) if include_path else None
    if folder:
        if not os.path.isdir(folder):
            raise UserError("E127", f"lm-eval: {folder}: no such folder of tasks")
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=folder)
    for name in tasks:
        if name not in manager.all_tasks and not name.endswith(".yaml"):
            near = nearest(name, manager.all_tasks)
            hint = f"; did you mean {near}?" if near else ""
            raise UserError("E127", f"lm-eval has no task {name!r}{hint} (lm-eval ls tasks)")
    return manager


# ---------------------------------------------------------------- as scores


def rows(results: dict, seconds: float = 0.0) -> list[Score]:
    """A lumen.scores.Score of every metric of every task and group; the first of each is its
    headline. seconds: of the whole run."""
    found = []
    for task, values in results["results"].items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            first = not found or found[-1].task != f"lm-eval/{task}"
            found.append(score(results, task, key, seconds, first))
    return found


def score(results: dict, task: str, key: str, seconds: float, headline: bool) -> Score:
    """Of one metric; key: lm-eval's NAME,FILTER."""
    values = results["results"][task]
    name, _, kind = key.partition(",")
    value, stderr = float(values[key]), values.get(f"{name}_stderr,{kind}")
    low, high = None, None
    if not isinstance(stderr, (int, float)) or not math.isfinite(stderr):
        stderr = None  # lm-eval says "N/A"
    else:
        low, high = value - 1.96 * stderr, value + 1.96 * stderr
    higher = results.get("higher_is_better", {}).get(task, {}).get(name, True)
    if higher and low is not None and 0 <= value <= 1:
        low, high = max(low, 0.0), min(high, 1.0)  # a share; lm-eval's error knows no borders
    chance, majority = baselines(results, task, name)
    count = values.get("sample_len") or results["n-samples"].get(task, {}).get("effective", 0)
    found = Score(
        task=f"lm-eval/{task}",
        metric=name if kind == "none" else f"{name} ({kind})",
        value=value,
        n=count,
        stderr=stderr,
        low=low,
        high=high,
        chance=chance,
        majority=majority,
        control=None,
        control_stderr=None,
        n_control=0,
        seconds=seconds,
        headline=headline,
        better="higher" if higher else "lower",
    )
    if stderr is None and count > 1:  # lm-eval knows no error of this metric
        return found
    return dataclasses.replace(found, verdict=verdict(found, None))


def baselines(results: dict, task: str, metric: str) -> tuple[float | None, float | None]:
    """(chance, majority) of a task's multiple choice; None: unknown."""
    config = results.get("configs", {}).get(task, {})
    samples = results.get("samples", {}).get(task)
    accuracy = metric in ("acc", "acc_norm", "acc_bytes")
    if not (samples and accuracy and config.get("output_type") == "multiple_choice"):
        return None, None
    targets = [str(sample["target"]) for sample in samples]
    chance = sum(1 / len(sample["arguments"]) for sample in samples) / len(samples)
    return chance, Counter(targets).most_common(1)[0][1] / len(targets)


def main(argv: list[str]) -> None:
    """lm-eval's command line, which knows `--model lumen` then."""
    need()
    import lm_eval.__main__

    import lumen.lm_eval_model  # noqa: F401  (registers it)

    sys.argv = ["lm-eval", *argv]
    lm_eval.__main__.cli_evaluate()


if __name__ == "__main__":
    from lumen.launch import command

    command(main)
