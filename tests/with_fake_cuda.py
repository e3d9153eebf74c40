"""Runs tests in a process that believes in a GPU: python tests/with_fake_cuda.py PYTEST'S WORDS

torch's C++ is told of it by fake_cuda.cpp, and before `import torch`, which asks once and for all.
The rest is fake_cuda.py's.
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def torch_folder() -> Path:
    """Where torch lies, without importing it."""
    return Path(find_spec("torch").submodule_search_locations[0])


def load(folder: str) -> None:
    """Compile fake_cuda.cpp into `folder` and register it. Before `import torch`."""
    torch_at, library = torch_folder(), f"{folder}/fake_cuda.so"
    words = [compiler(), "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_at}/include"]
    words += [f"{ROOT}/tests/fake_cuda.cpp", "-o", library]
    words += [f"-L{torch_at}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_at}/lib"]
    subprocess.run(words, check=True)
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL).register_fake_cuda()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        load(folder)
    import pytest

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    raise SystemExit(pytest.main(sys.argv[1:]))
