"""Notebooks run from beginning to end, with public names only."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import sdlora

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def execute(name: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    client = NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()
    return notebook


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_nothing_of_the_machine_is_kept(file):
    """R-27: what libraries print about the machine, its paths and its clock are not committed."""
    for cell in nbformat.read(file, as_version=4).cells:
        assert "execution" not in cell.metadata, "remove the times"
        kept = [output for output in cell.get("outputs", []) if output.get("name") == "stderr"]
        assert not kept, "remove what was printed to stderr"


@pytest.mark.slow
@pytest.mark.usefixtures("shared_cache")
def test_train_a_style(monkeypatch):
    """The story from a folder to a pipeline, at fewer steps; each picture is there."""
    monkeypatch.setenv("SDLORA_NOTEBOOK_STEPS", "1")
    notebook = execute("train_a_style.ipynb")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    errors = "".join(output.text for output in outputs if output.get("name") == "stderr")
    assert "unexpected keys" not in errors
    assert "missing keys" not in errors


@pytest.mark.slow
@pytest.mark.usefixtures("shared_cache")
def test_is_it_learnt(monkeypatch, tmp_path):
    """The table of presets, at fewer steps and seeds."""
    for name, value in {"SEEDS": "[0]", "NOTEBOOK_STEPS": "3", "FIGURES": str(tmp_path)}.items():
        monkeypatch.setenv(f"SDLORA_{name}", value)
    execute("is_it_learnt.ipynb")
    assert len((tmp_path / "presets.md").read_text(encoding="utf-8").splitlines()) == 4
    assert {path.name for path in tmp_path.glob("*.png")} == {"openmoji.png", "fluent-mono.png"}


@pytest.mark.slow
@pytest.mark.usefixtures("shared_cache")
def test_how_much_rank(monkeypatch, tmp_path):
    """The table of the sweep is read, and two ranks are trained for 20 steps."""
    monkeypatch.setenv("SDLORA_FIGURES", str(tmp_path))
    execute("how_much_rank.ipynb")
    committed = (NOTEBOOKS / "figures" / "ranks.md").read_text(encoding="utf-8")
    assert (tmp_path / "ranks.md").read_text(encoding="utf-8") == committed
    assert (tmp_path / "ranks.png").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("shared_cache")
def test_grow_an_adapter_tree(monkeypatch, tmp_path):
    """Root, leaf, switching and flattening, at fewer steps, seeds and leaves."""
    for name, value in {
        "TWISTS": '["duotone"]',
        "SEEDS": "[0]",
        "NOTEBOOK_STEPS": "2",
        "FIGURES": str(tmp_path),
    }.items():
        monkeypatch.setenv(f"SDLORA_{name}", value)
    notebook = execute("grow_an_adapter_tree.ipynb")
    printed = "".join(o.text for cell in notebook.cells for o in cell.get("outputs", []) if "text" in o)
    assert "problems: []" in printed
    assert "rank 20" in printed
    assert len((tmp_path / "tree.md").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_public_names_only(path):
    """A notebook shows what users may rely on; and it is small."""
    assert path.stat().st_size < 1_000_000
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    lines = [line for cell in cells for line in cell.splitlines() if not line.startswith(("!", "%"))]
    tree = ast.parse("\n".join(lines))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sdlora"
    }
    assert used <= {*sdlora.__all__, "__file__"}
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in modules if name and name.startswith("sdlora")]
