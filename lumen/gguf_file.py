"""A run as one GGUF file: `python export.py to_gguf out/run FILE`."""

from __future__ import annotations

from lumen.errors import UserError, a_path


def options(parser) -> None:
    parser.add_argument("run", type=a_path, help="a run, a step of it, or a Hugging Face folder")
    parser.add_argument("file", type=a_path)


def to_gguf(run, file, say=print) -> dict:
    raise UserError("E404", "to be written")
