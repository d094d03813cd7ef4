"""Run notebooks from their py:percent text and store them with outputs.

Edit the ``.py`` beside a notebook, then ``python notebooks/execute.py`` (all of them) or ``python notebooks/execute.py
notebooks/1_explore.py``. ``--data vnc --into FOLDER`` runs them on real data, into another folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent
DEFAULT_DATA = 'DATA = "phantom"'
TIMEOUT_S = 1200
"""For one cell: what takes seconds on the phantom may take minutes on real data."""


def list_notebooks() -> list[Path]:
    """The text of every notebook, in reading order."""
    return sorted(path for path in NOTEBOOKS.glob("[0-9]_*.py"))


def execute(text: Path, data: str = "phantom") -> Any:
    """Run a notebook top to bottom in its own folder and return it with outputs.

    Raises
    ------
    ValueError
        If another data set is asked for and the notebook has no cell that chooses one.
    nbclient.exceptions.CellExecutionError
        If a cell fails.
    """
    notebook = jupytext.read(text)
    if data != "phantom":
        chosen = [cell for cell in notebook.cells if cell.source.startswith(DEFAULT_DATA)]
        if not chosen:
            raise ValueError(f"{text} has no cell that begins with {DEFAULT_DATA}; only such notebooks can change data")
        chosen[0].source = chosen[0].source.replace(DEFAULT_DATA, f'DATA = "{data}"')
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        kernel_name="python3",
        # Times of cells differ from run to run, and would hide what changed.
        record_timing=False,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    )
    client.execute()
    for cell in notebook.cells:
        # A notebook that is stored again without a change should be the same file.
        cell.id = f"cell-{notebook.cells.index(cell)}"
    notebook.metadata.pop("language_info", None)
    return notebook


def main() -> None:
    """Execute the notebooks asked for and store them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help=".py files; default: all")
    parser.add_argument("--data", default="phantom", help="phantom, or a folder of the real data")
    parser.add_argument("--into", type=Path, default=NOTEBOOKS, help="folder for the notebooks with their outputs")
    arguments = parser.parse_args()
    arguments.into.mkdir(parents=True, exist_ok=True)
    for text in arguments.notebooks or list_notebooks():
        path = arguments.into / f"{text.stem}.ipynb"
        nbformat.write(execute(text, arguments.data), path)
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
