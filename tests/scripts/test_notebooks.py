"""The notebooks run from top to bottom, and are kept without their output."""

import json
from pathlib import Path

import pytest

from tests.architecture.tree import ROOT
from tests.scripts.documents import cells

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def run(notebook: Path, num_cells: int | None = None) -> dict:
    """The names that a notebook's code leaves behind."""
    namespace: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells(notebook)[:num_cells], 1):
        exec(compile(cell, f"{notebook.name}, cell {number}", "exec"), namespace)
    return namespace


def test_there_is_a_notebook():
    assert [path.stem for path in NOTEBOOKS] == ["convert", "quickstart"]


@EACH
def test_output_is_cleared(notebook):
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@EACH
def test_with_a_checkpoint(notebook, place, monkeypatch):
    monkeypatch.setenv("LLAMA_CHECKPOINT", "runs/demo")
    assert run(notebook)["llm"].tokenizer.vocab_size == 380


@EACH
def test_without_a_checkpoint_it_makes_one(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLAMA_CHECKPOINT", raising=False)
    left = run(notebook, num_cells=2)  # it loads and writes; the rest is the same
    assert left["llm"].tokenizer is None
    assert left["completion"].tokens
