"""Every notebook runs top to bottom on the phantom, is stored with its outputs, and is small enough to be read."""

import importlib.util
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
MOST_BYTES = 500_000
TEXTS = sorted(NOTEBOOKS.glob("[0-9]_*.py"))
STORED = sorted(NOTEBOOKS.rglob("*.ipynb"))


@pytest.fixture(scope="module")
def execute():
    """The function that stores notebooks, from the script beside them."""
    spec = importlib.util.spec_from_file_location("execute_notebooks", NOTEBOOKS / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_it_runs_on_the_phantom(text, execute):
    found = outputs(execute(text))
    assert sum("image/png" in o.get("data", {}) or "image/jpeg" in o.get("data", {}) for o in found) >= 1
    assert not [o for o in found if o.output_type in ("stream", "error")], "a notebook shows results, no warnings"


def test_every_text_is_stored_as_a_notebook():
    assert {path.stem for path in TEXTS} == {path.stem for path in NOTEBOOKS.glob("*.ipynb")}


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.relative_to(NOTEBOOKS).as_posix())
def test_text_and_notebook_agree(path):
    stored = nbformat.read(path, 4)
    written = jupytext.read(NOTEBOOKS / f"{path.stem}.py")
    data = "phantom" if path.parent == NOTEBOOKS else path.parent.name
    assert [(c.cell_type, c.source) for c in stored.cells] == [
        (c.cell_type, c.source.replace('DATA = "phantom"', f'DATA = "{data}"')) for c in written.cells
    ]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.relative_to(NOTEBOOKS).as_posix())
def test_it_is_stored_with_outputs_and_small_enough(path):
    assert path.stat().st_size <= MOST_BYTES
    assert len(outputs(nbformat.read(path, 4))) >= 3
    assert (NOTEBOOKS / f"{path.stem}.py").exists()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_it_imports_and_shows_but_defines_nothing(path):
    lines = path.read_text().splitlines()
    assert not [line for line in lines if line.lstrip().startswith(("def ", "class ", "async def "))]
    assert 'DATA = "phantom"' in path.read_text()
