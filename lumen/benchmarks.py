"""Public evaluation files that a user has, as tasks; prompts and choices as lm-eval renders them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lumen.questions import Options, Task

# name -> (file or folder, options) -> its tasks
READERS: dict[str, Callable[[Path, Options], list[Task]]] = {}
