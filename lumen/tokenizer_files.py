"""Where the files of tokenizers lie: tiktoken's cache, Hugging Face's cache, a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile

from lumen.errors import UserError
from lumen.patterns import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN
from lumen.vocabulary import EOT

_END = "<|endofprompt|>"
_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, _END: 100276}
FILES = {  # tiktoken's: pattern, special ids, sha256
    "r50k_base": (GPT2_PATTERN, {EOT: 50256},
                  "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"),
    "p50k_base": (GPT2_PATTERN, {EOT: 50256},
                  "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069"),
    "cl100k_base": (CL100K_PATTERN, {EOT: 100257, **_FIM},
                    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"),
    "o200k_base": (O200K_PATTERN, {EOT: 199999, _END: 200018},
                   "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"),
}  # fmt: skip
# gpt2 and r50k_base are one vocabulary; r50k_base has it in one file, not two
NAMED = {"gpt2": "r50k_base"} | {name: name for name in FILES}

HUB = "hf:"
# what a folder has of a tokenizer; the first two are it, the others name its end of document
WANTED = ("tokenizer.json", "tokenizer.model")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def tiktoken_file(name: str, sha256: str) -> bytes:
    """tiktoken's file, from its cache folder or else the network, checked. Not by tiktoken's own
    loader: that one waits for the network without a limit and deletes a file whose sum is wrong.
    Never another vocabulary instead."""
    url = f"https://openaipublic.blob.core.windows.net/encodings/{NAMED[name]}.tiktoken"
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = folder or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    path, problem = os.path.join(folder, hashlib.sha1(url.encode()).hexdigest()), "is not there"
    if os.path.exists(path):
        with open(path, "rb") as cached:
            data = cached.read()
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        problem = "is damaged (another sha256)"
    try:
        import requests  # tiktoken's own dependency

        answer = requests.get(url, timeout=(4, 15))
        answer.raise_for_status()
        if hashlib.sha256(answer.content).hexdigest() != sha256:
            raise ValueError("what came has another sha256")
    except Exception as error:
        text = f"tokenizer {name}: {path} {problem}, and the network did not give it"
        text += f" ({type(error).__name__});\n  fetch {url} elsewhere and put it there"
        text += " under exactly that name, or set TIKTOKEN_CACHE_DIR to its folder"
        raise UserError("E115", text) from None
    with contextlib.suppress(OSError):  # keeping it only saves the next download
        os.makedirs(folder, exist_ok=True)
        with open(f"{path}.{os.getpid()}.tmp", "wb") as target:
            target.write(answer.content)
        os.replace(target.name, path)
    return answer.content


def hub_folder(spec: str) -> str:
    """The folder with the tokenizer of hf:ORG/NAME or hf:ORG/NAME@REVISION: in Hugging Face's
    cache, or else from the network. E003: huggingface_hub is not installed; E115: neither has
    it."""
    repo, _, revision = spec.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError("E115", f"tokenizer {spec}: a name on Hugging Face is hf:ORG/NAME")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        text = f"tokenizer {spec}: pip install huggingface_hub, or give the path of the file"
        raise UserError("E003", text) from None
    what = {"repo_id": repo, "revision": revision or None, "allow_patterns": [*WANTED, *BESIDE]}
    reason = "it has no tokenizer.json"
    for local in (True, False):  # the cache first: the same data tomorrow, and without a network
        try:
            folder = snapshot_download(**what, local_files_only=local, etag_timeout=10)
        except Exception as error:  # of many classes: offline, no such repository, gated
            reason = type(error).__name__
            continue
        if any(os.path.exists(os.path.join(folder, name)) for name in WANTED):
            return folder
    text = f"tokenizer {spec}: not in Hugging Face's cache, and the network did not give it"
    text += f" ({reason});\n  hf download {repo} tokenizer.json tokenizer_config.json elsewhere"
    text += " (hf auth login first where it is gated), and give the path of the file here"
    raise UserError("E115", text)


def file_in(folder: str) -> str:
    """The tokenizer in that folder: tokenizer.json, or else a SentencePiece model."""
    for name in WANTED:
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path
    return os.path.join(folder, WANTED[0])


def eos_beside(path: str) -> list[str]:
    """What the files beside a tokenizer.json call eos_token, by text; of those that can be
    read."""
    found = []
    for name in BESIDE:
        try:
            with open(os.path.join(os.path.dirname(path), name), encoding="utf-8") as file:
                token = json.load(file).get("eos_token")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if isinstance(token, dict):  # an AddedToken
            token = token.get("content")
        if isinstance(token, str):
            found.append(token)
    return found
