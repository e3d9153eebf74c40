"""The `data` key: several sources, their weights, phases and difficulty, checked and spelt out.

    data:
      sources: {web: {dir: data/web, weight: 0.7, buckets: 3}, chat: {dir: data/chat, weight: 0.3}}
      phases:
        - {name: base, epochs: 1, weights: {web: 1}}
        - {name: chat, epochs: 2, weights: {web: 0.2, chat: 0.8}, lr_scale: 0.1, warmup_steps: 100}

Everything here is a function of what was written. A source of n buckets is n sources, web.1 to
web.n, easy to hard (lumen/buckets.py); its own name stands for all of them.
"""

from __future__ import annotations

import os

import yaml

from lumen.errors import UserError
from lumen.values import inside

LENGTHS = ("until", "epochs", "tokens")  # of a phase, one of them
FILE = "mixture.yaml"  # what prepare_data.py leaves beside several folders
# what stands inside the key, for lumen.values.inside
KEYS = {
    "sources": {"*": {"dir": str, "weight": float, "buckets": int, "difficulty": str}},
    "phases": [
        {
            "name": str,
            "until": float,
            "epochs": float,
            "tokens": float,
            "weights": {"*": float},
            "lr_scale": float,
            "warmup_steps": float,
        }
    ],
    "curriculum": float,
}


# ---------------------------------------------------------------- what the rest of the house asks


def leaves(name: str, spec: dict) -> list[str]:
    """The sources that one entry of `sources` stands for: itself, or its buckets."""
    n = spec.get("buckets") or 1
    return [name] if n == 1 else [f"{name}.{k + 1}" for k in range(n)]


def spread(sources: dict, weights: dict[str, float]) -> dict[str, float]:
    """Weights with those of whole sources shared out to their buckets, which are equally large."""
    found: dict[str, float] = {}
    for name, weight in weights.items():
        parts = leaves(name, sources[name]) if name in sources else [name]
        for part in parts:
            found[part] = found.get(part, 0.0) + weight / len(parts)
    return found


def weights_of(data: dict) -> dict[str, float]:
    """Those of the sources where there are no phases."""
    sources = data["sources"]
    return spread(sources, {name: spec.get("weight", 1.0) for name, spec in sources.items()})


def phases_of(data: dict | None) -> list[dict]:
    """The phases with the weights of buckets; [] where there is one mixture from start to end."""
    phases = (data or {}).get("phases") or []
    return [phase | {"weights": spread(data["sources"], phase["weights"])} for phase in phases]


def whole(sources: dict, weights: dict[str, float]) -> dict[str, float]:
    """The other way round: weights of buckets as those of the sources that they are parts of."""
    home = {part: name for name, spec in sources.items() for part in leaves(name, spec)}
    found: dict[str, float] = {}
    for name, weight in weights.items():
        found[home.get(name, name)] = found.get(home.get(name, name), 0.0) + weight
    return found


def sets_length(data: dict | None) -> bool:
    """Whether the phases alone say how long the run is."""
    phases = (data or {}).get("phases") or []
    absolute = [
        "epochs" in phase or "tokens" in phase or phase.get("until", 0) > 1 for phase in phases
    ]
    return bool(phases) and all(absolute)


# ---------------------------------------------------------------- curriculum


def with_curriculum(data: dict, place, notes: list[str]) -> dict:
    """`curriculum: a` as phases, a stage for each bucket, printed.

    In stage s of n bucket b has the share (1 - a) / n of its source, and bucket s gets a on top.
    Over the whole run every bucket has the same share, whatever a is: nothing is seen more often
    than without a curriculum, only earlier or later. 0: no order; 1: one bucket after the other.
    """
    a = data.get("curriculum")
    if a is None or not data.get("sources"):
        return data
    data = {key: value for key, value in data.items() if key != "curriculum"}
    sources = data["sources"]
    counts = sorted({len(leaves(name, spec)) for name, spec in sources.items()} - {1})
    if not 0 <= a <= 1:
        refuse(place, "data.curriculum", f"{a} must be in [0, 1]: how far easy comes before hard")
    if data.get("phases"):
        text = "makes phases, and there are phases; write the weights of buckets there, NAME.1 ..."
        refuse(place, "data.curriculum", text)
    if len(counts) != 1:
        text = "needs sources with buckets: N, all with the same N"
        refuse(place, "data.curriculum", text)
    n, phases = counts[0], []
    for stage in range(n):
        weights = {}
        for name, spec in sources.items():
            parts, weight = leaves(name, spec), spec.get("weight", 1.0)
            for k, part in enumerate(parts):
                share = (1 - a) / n + (a if k == stage else 0) if len(parts) > 1 else 1
                weights[part] = round(weight * share, 6)
        phase = {"name": f"stage {stage + 1}", "weights": weights}
        if stage < n - 1:
            phase["until"] = round((stage + 1) / n, 6)
        phases.append(phase)
    data["phases"] = phases
    notes += told(f"data.curriculum: {a:g} is, written out", {"data": data})
    return data


def told(what: str, tree: dict) -> list[str]:
    """Notes: `what`, and below it the YAML that says the same."""
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=88)
    return [f"{what}:", *(f"  {line}" for line in text.splitlines())]


# ---------------------------------------------------------------- checks


def refuse(place, key: str, text: str):
    raise UserError("E002", f"{place(key)}: {key}: {text}")


def check_data(data: dict, place) -> None:
    """E002 unless sources say where they are, and phases weigh them and come to an end."""
    sources = data.get("sources")
    if not sources:
        refuse(place, "data", "{sources: {NAME: {dir: FOLDER, weight: 1.0}}} is expected")
    for name, spec in sources.items():
        check_source(name, spec, place)
    names = [part for name, spec in sources.items() for part in leaves(name, spec)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        refuse(place, "data.sources", f"{', '.join(twice)} is a source and a bucket of another")
    if not data.get("phases"):
        weights = {name: spec.get("weight", 1.0) for name, spec in sources.items()}
        check_weights(weights, place, "data.sources")
    for i, phase in enumerate(data.get("phases") or []):
        check_phase(data, i, phase, {*sources, *names}, place)


def check_source(name: str, spec: dict, place) -> None:
    key, buckets = f"data.sources.{name}", spec.get("buckets", 1)
    if not spec.get("dir") or spec.get("weight", 1.0) < 0:
        refuse(place, key, "{dir: FOLDER, weight: 1.0} is expected, the weight not below 0")
    if not 1 <= buckets <= 64:
        refuse(place, f"{key}.buckets", f"{buckets} must be in [1, 64]")
    difficulty = spec.get("difficulty")
    if difficulty and buckets == 1:
        refuse(place, f"{key}.difficulty", "needs buckets: N, 3 for example")
    if difficulty and difficulty not in ("length", "loss") and not difficulty.endswith(".npy"):
        text = f"{difficulty} is not length, loss, or a FILE.npy with a number for each document"
        refuse(place, f"{key}.difficulty", text)


def check_phase(data: dict, i: int, phase: dict, names: set[str], place) -> None:
    """One of data.phases; names: of sources and buckets."""
    key, weights = f"data.phases[{i}]", phase.get("weights") or {}
    if not weights or set(weights) - names:
        text = f"{{until: STEP, weights: {{NAME: ...}}}} with names of {', '.join(sorted(names))}"
        refuse(place, key, f"{text} is expected")
    check_weights(weights, place, key)
    lengths = [name for name in LENGTHS if name in phase]
    if len(lengths) > 1:
        refuse(place, key, f"{' and '.join(lengths)} all set its length; drop all but one")
    if not lengths and i < len(data["phases"]) - 1:
        text = "until: STEP (or a fraction of max_steps), epochs or tokens: only the last phase"
        refuse(place, key, f"needs {text} may go on to the end of the run")
    if phase.get("until", 1) < 0:
        text = f"{phase['until']} is neither a step nor a fraction of max_steps"
        refuse(place, f"{key}.until", text)
    for name in ("epochs", "tokens"):
        if not phase.get(name, 1) > 0:
            refuse(place, f"{key}.{name}", f"{phase[name]} must be above 0")
    for name in ("lr_scale", "warmup_steps"):
        if phase.get(name, 1) < 0:
            refuse(place, f"{key}.{name}", f"{phase[name]} must not be below 0")
    if i == 0 and "warmup_steps" in phase:
        refuse(place, f"{key}.warmup_steps", "the run's own warmup_steps is that of its beginning")


def check_weights(weights: dict[str, float], place, key: str) -> None:
    if min(weights.values()) < 0 or max(weights.values()) == 0:
        refuse(place, key, f"weights {weights}: none below 0, not all 0")


# ---------------------------------------------------------------- a folder of several datasets


def of_folder(folder: str, notes: list[str]) -> dict | None:
    """The `data` block that prepare_data.py has left in a folder of several datasets; None: there
    is none. E111: it is damaged."""
    file = os.path.join(folder, FILE)
    if os.path.exists(os.path.join(folder, "manifest.json")) or not os.path.exists(file):
        return None
    try:
        with open(file, encoding="utf-8") as text:
            data = yaml.safe_load(text)["data"]
        data = inside(data, KEYS, lambda key: file, "data")
        check_data(data, lambda key: file)
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError, UserError) as error:
        text = getattr(error, "text", f"{type(error).__name__} {error}")
        raise UserError("E111", f"{file} is damaged: {text}") from None
    for spec in data["sources"].values():
        spec["dir"] = os.path.join(folder, spec["dir"])  # an absolute one stays
    notes += told(f"data_dir: {folder} is, by its {FILE}", {"data": data})
    return data
