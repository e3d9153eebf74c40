"""The options of `python export.py quantize`, what users of LuminaAI and of other tools call them
(the section of that name in configs/aliases.yaml), and methods that are other tools' work."""

from __future__ import annotations

from lumen import option_names
from lumen.errors import UserError, a_path
from lumen.quantised import KINDS, MAX_LOSS, METHODS

COMMAND = "export.py quantize"
ELSEWHERE = ("awq", "smoothquant", "autoround", "fp8", "nvfp4", "mxfp4", "w8a8", "sparsegpt")

# llm-compressor's own call; tools of vLLM and SGLang read what it writes
RECIPE = """\
--method {method}: not here, but llm-compressor does it on the Hugging Face folder:

    python export.py to_hf {run} HF
    pip install llmcompressor              # in an environment of its own: it wants its own torch
    python - <<'END'
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.{module}
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("HF", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained("HF")
    texts = open("CALIBRATION.txt").read().split("\\n\\n")
    rows = Dataset.from_dict({{"text": texts}})
    oneshot(model=model, tokenizer=tokenizer, dataset=rows, recipe=[{modifier}],
            max_seq_length=512, num_calibration_samples=128, output_dir="HF-{method}")
    END

HF-{method} is for vLLM and SGLang; Lumen does not read it. Here: --method rtn or gptq"""
SCHEME = '(targets="Linear", ignore=["lm_head", "re:.*gate$"], scheme="{scheme}")'
MODIFIERS = {  # method -> (module, modifier's name, scheme)
    "awq": ("awq", "AWQModifier", "W4A16"),
    "smoothquant": ("quantization", "QuantizationModifier", "W8A8"),
    "w8a8": ("quantization", "QuantizationModifier", "W8A8"),
    "fp8": ("quantization", "QuantizationModifier", "FP8_DYNAMIC"),
    "nvfp4": ("quantization", "QuantizationModifier", "NVFP4"),
}


def options(p) -> None:
    """Those of `quantize`, on its parser."""
    p.add_argument("run", type=a_path, help="a run, a step of it, or a Hugging Face folder")
    p.add_argument("folder", type=a_path)
    p.add_argument("--bits", type=a_bits, default=8, help="8: a scale a row; 4: one for 128 inputs")
    text = "rtn: to the nearest; gptq: by what the layers see of the run's training rows"
    p.add_argument("--method", default="rtn", help=f"{text} (default rtn)")
    text = "percent more bits per byte than before: beyond it nothing is written"
    p.add_argument("--max_loss", type=float, metavar="X", help=f"{text} (default {MAX_LOSS:g})")
    text = "held-out tokens to measure on (default 65536; 0: none)"
    p.add_argument("--eval_tokens", type=int, default=65536, metavar="N", help=text)
    text = "a prepared folder whose held-out rows are measured on, not the run's"
    p.add_argument("--val_data", metavar="DIR", help=text)
    text = "of gptq: text or a prepared folder, not the run's training rows"
    p.add_argument("--calibrate", metavar="FILE|DIR", help=text)
    text = "of gptq: how many tokens (default 65536)"
    p.add_argument("--calibrate_tokens", type=int, default=65536, metavar="N", help=text)
    text = "of gptq: the columns of large inputs first"
    p.add_argument("--act_order", action="store_true", help=text)
    p.add_argument("--best", action="store_true", help="the best step instead of the newest")
    p.add_argument("--step", type=int, help="the step of this number")


def a_bits(text: str) -> int:
    if text not in map(str, KINDS):
        known = ", ".join(map(str, KINDS))
        raise UserError("E002", f"command line: --bits {text!r} is none of {known}")
    return int(text)


def translate(argv: list[str], own, say) -> list[str]:
    """`quantize ...` under our names; what was another's is said. E002."""
    words, notes = option_names.translate(COMMAND, argv[1:], own)
    for note in notes:
        say(note)
    return [argv[0], *words]


def check(how: dict, run) -> None:
    """E002: a method that is not here, with the command that has it, or numbers out of range."""
    method = how.get("method", "rtn")
    if method in ELSEWHERE:
        module, modifier, scheme = MODIFIERS.get(method, MODIFIERS["awq"])
        import_line = f"{module} import {modifier}"
        call = modifier + SCHEME.format(scheme=scheme)
        text = RECIPE.format(method=method, run=run, module=import_line, modifier=call)
        raise UserError("E002", text)
    if method not in METHODS:
        known = ", ".join((*METHODS, *ELSEWHERE))
        raise UserError("E002", f"--method {method!r} is none of {known}")
    for name, least in (("eval_tokens", 0), ("calibrate_tokens", 1)):
        if how.get(name, least) < least:
            raise UserError("E002", f"--{name} {how[name]} must be at least {least}")
    if (most := how.get("max_loss")) is not None and not 0 <= most < float("inf"):
        raise UserError("E002", f"--max_loss {most:g} must be a percentage from 0 on")
    if most is not None and how.get("eval_tokens") == 0:
        raise UserError("E002", "--max_loss needs --eval_tokens: nothing would be measured")
    if method == "rtn" and (how.get("calibrate") or how.get("act_order")):
        text = "--calibrate and --act_order are of --method gptq; rtn looks at weights only"
        raise UserError("E002", text)
