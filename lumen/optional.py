"""Packages that Lumen can do without: what each is for, and which version is here."""

from __future__ import annotations

import importlib.metadata

PACKAGES = {
    "wandb": "wandb_project",
    "tensorboard": "tensorboard: true",
    "matplotlib": "pictures",
    "flash-attn": "attention: flash, on NVIDIA GPUs",
    "transformers": "export.py --check",
    "gguf": "export.py to_gguf",
    "onnx": "export.py to_onnx",
    "fastapi": "serve.py",
    "pyarrow": ".parquet and .arrow",
    "datasets": "hf:NAME",
    "lm-eval": "evaluate.py --lm_eval",
}


def lines() -> list[str]:
    """A line for each, for `python -m lumen.machine`."""
    found = []
    for package, use in PACKAGES.items():
        try:
            text = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            text = "not there"
        found.append(f"optional     {package}: {text}, for {use}")
    return found
