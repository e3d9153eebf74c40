"""Kind reply: what is judged by what the model writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lumen.questions import Options, Task

# name -> (file or folder, options) -> its tasks: gsm8k, exact, humaneval, functions
READERS: dict[str, Callable[[Path, Options], list[Task]]] = {}
