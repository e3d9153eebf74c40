"""What users of other evaluators type, as options of evaluate.py: `max_boolq_samples -> limit 100`.

The table is the section evaluate.py of configs/aliases.yaml.
"""

from __future__ import annotations


def translate(argv: list[str], own=(), default=()) -> tuple[list[str], list[str]]:
    """(the words under our names, notes for the user). E002 where a name has another meaning here.

    own: evaluate.py's options, "--limit"; default: the tasks that it asks without --tasks.
    """
    return argv, []
