"""A notebook without Jupyter: its code cells in order, in one namespace.

python tests/notebook.py docs/tour.ipynb    # runs it, and writes what it prints into it
"""

import base64
import contextlib
import io
import json
import sys
from pathlib import Path

DPI = 60  # of pictures: the page is to stay small


def read(path) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict) -> tuple[dict, list[list[dict]]]:
    """(the namespace that is left, the outputs of each code cell)."""
    space, outputs = {"__name__": "__main__"}, []
    for number, cell in enumerate(code_cells(notebook), 1):
        said = io.StringIO()
        code = compile("".join(cell["source"]), f"cell {number}", "exec")
        with contextlib.redirect_stdout(said):
            exec(code, space)
        found = pictures()
        if said.getvalue():
            lines = said.getvalue().splitlines(keepends=True)
            found.insert(0, {"name": "stdout", "output_type": "stream", "text": lines})
        outputs.append(found)
    return space, outputs


def pictures() -> list[dict]:
    """What a cell has drawn, as Jupyter shows it; nothing stays open."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    import matplotlib.pyplot as plt

    found = []
    for number in plt.get_fignums():
        file = io.BytesIO()
        plt.figure(number).savefig(file, format="png", dpi=DPI)
        data = {"image/png": base64.b64encode(file.getvalue()).decode() + "\n"}
        found.append({"output_type": "display_data", "metadata": {}, "data": data})
    plt.close("all")
    return found


def write(path, notebook: dict) -> None:
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    Path(path).write_text(text + "\n", encoding="utf-8")


def main(path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    notebook = read(path)
    _, outputs = run(notebook)
    for number, (cell, found) in enumerate(zip(code_cells(notebook), outputs), 1):
        cell["execution_count"], cell["outputs"] = number, found
    write(path, notebook)
    print(f"{path}: {len(Path(path).read_bytes()):,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
