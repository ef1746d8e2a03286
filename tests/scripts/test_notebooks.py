"""The notebooks: kept without output, open in Colab by a click, run to the bottom.

nbmake runs them, each in a kernel of its own, at a place where nothing is yet but what
the repository has: the first one trains the model, and the others find it; but that of
Ghost Attention has a model of its own.
"""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbmake.nb_run import NotebookRun

import llama_jax
from llama_jax.config.recipe import load_recipe
from llama_jax.train.metrics import METRICS, read_metrics
from tests.architecture.tree import ROOT
from tests.scripts.documents import cells

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
EACH = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
# These two also go without a model that writes.
PLAIN = pytest.mark.parametrize("name", ["convert", "quickstart"])
PAGE = ROOT / "docs/pages/generate.md"
# A cell, on a machine that has other things to do.
SECONDS = 900


def content(notebook: Path) -> dict:
    """A notebook as its file has it."""
    return json.loads(notebook.read_text(encoding="utf-8"))


def is_colab(cell: str) -> bool:
    """Whether it is the cell that prepares Colab, in a language of its own."""
    return '"google.colab"' in cell


def run_here(name: str, num_cells: int | None = None) -> dict:
    """The names that a notebook's code leaves behind, run in this process."""
    notebook = ROOT / f"docs/notebooks/{name}.ipynb"
    namespace: dict = {"__name__": "__main__"}
    plain = [cell for cell in cells(notebook) if not is_colab(cell)]
    for number, cell in enumerate(plain[:num_cells], 1):
        exec(compile(cell, f"{notebook.name}, cell {number}", "exec"), namespace)
    return namespace


def run(notebook: Path) -> nbformat.NotebookNode:
    """A notebook after it ran in a kernel, with all that it showed."""
    result = NotebookRun(notebook, SECONDS).execute()
    assert result.error is None, result.error.trace
    return result.nb


def shown(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """What a notebook's cells have shown, of one MIME type; or what they printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    if kind == "printed":
        return [output.text for output in outputs if output.output_type == "stream"]
    return [output.data[kind] for output in outputs if kind in output.get("data", ())]


def test_there_are_notebooks():
    assert NAMES == [
        "attention",
        "chat",
        "convert",
        "generate",
        "ghost_attention",
        "quickstart",
        "train",
    ]


@EACH
def test_output_is_cleared(notebook):
    for cell in content(notebook)["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@EACH
def test_opens_in_colab(notebook):
    first, second, *rest = content(notebook)["cells"]
    badge = "".join(first["source"]).splitlines()[0]
    assert re.fullmatch(
        r"\[!\[Open in Colab\]\(https://colab\.research\.google\.com/assets/"
        r"colab-badge\.svg\)\]\(https://colab\.research\.google\.com/github/[\w.-]+/"
        rf"[\w.-]+/blob/main/docs/notebooks/{notebook.name}\)",
        badge,
    )
    assert is_colab("".join(second["source"]))
    assert second["metadata"]["tags"] == ["colab"]
    others = {cell for cell in map(is_colab, cells(notebook)[1:])}
    assert rest and others == {False}


@PLAIN
def test_with_a_checkpoint(name, place, monkeypatch):
    monkeypatch.setenv("LLAMA_CHECKPOINT", "runs/demo")
    assert run_here(name)["llm"].tokenizer.vocab_size == 380


@PLAIN
def test_without_a_checkpoint_it_makes_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLAMA_CHECKPOINT", raising=False)
    left = run_here(name, num_cells=2)  # it loads and writes; the rest is the same
    assert left["llm"].tokenizer is None
    assert left["completion"].tokens


def test_the_page_is_of_the_notebook():
    """Run with other versions it shows other numbers; its code is the notebook's."""
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)
    code = cells(ROOT / "docs/notebooks/generate.ipynb")
    assert blocks == [cell for cell in code if not is_colab(cell)], "make page"
    pictures = PAGE.with_name("generate_files")
    linked = re.findall(r"!\[png\]\(generate_files/(\w+\.png)\)", page)
    assert sorted(linked) == sorted(path.name for path in pictures.iterdir()) != []
    together = [PAGE, *pictures.iterdir()]
    assert sum(path.stat().st_size for path in together) < 200_000


def fresh(folder: Path) -> Path:
    """The notebooks and what they need of the repository, where nothing ran yet."""
    shutil.copytree(
        ROOT / "docs/notebooks",
        folder / "docs/notebooks",
        ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
    )
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def beside_the_notebooks(folder: Path, name: str) -> ModuleType:
    """A module that notebooks import from where they are."""
    path = folder / f"docs/notebooks/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def own_kernels():
    """Kernels see one device, as on a reader's machine, and no checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")
        patch.delenv("LLAMA_CHECKPOINT", raising=False)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, own_kernels) -> tuple[Path, nbformat.NotebookNode]:
    """A place where train.ipynb ran, and what it showed."""
    folder = fresh(tmp_path_factory.mktemp("notebooks"))
    return folder, run(folder / "docs/notebooks/train.ipynb")


@pytest.mark.slow
def test_train(trained):
    folder, notebook = trained
    records = read_metrics(folder / "runs/notebook-demo" / METRICS)
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[0] == pytest.approx(7.6, abs=0.2)  # log 2048: nothing is known
    assert sum(losses[-20:]) / 20 < 4.6
    samples = "".join(shown(notebook, "printed")).count("=== written after step")
    assert samples == 5
    assert len(shown(notebook, "image/png")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("train", "ghost_attention")]
)
def test_runs(trained, name):
    folder, _ = trained
    notebook = run(folder / f"docs/notebooks/{name}.ipynb")
    assert "training one" not in "".join(shown(notebook, "printed"))
    pictures, html = shown(notebook, "image/png"), shown(notebook, "text/html")
    assert len(pictures) == {"attention": 3, "chat": 1, "generate": 2}.get(name, 0)
    expected = {"chat": 3, "generate": 2, "quickstart": 1, "convert": 1}.get(name, 0)
    assert sum("<span title=" in text for text in html) == expected


@pytest.mark.slow
def test_the_first_that_needs_a_model_trains_it(tmp_path, monkeypatch, capsys):
    """What all of them begin with, at a place of its own and with fewer steps."""
    monkeypatch.delenv("LLAMA_CHECKPOINT", raising=False)
    path = fresh(tmp_path) / "docs/notebooks/demo_model.py"
    source = path.read_text()
    assert source.count("num_steps = 500") == 1
    path.write_text(source.replace("num_steps = 500", "num_steps = 5"))
    demo_model = beside_the_notebooks(tmp_path, "demo_model")

    assert demo_model.checkpoint() == tmp_path / "runs/notebook-demo"
    assert "training one" in capsys.readouterr().out
    (completion,) = llama_jax.load(demo_model.checkpoint()).generate(["My lord"])
    assert completion.tokens
    assert capsys.readouterr().out == ""

    (tmp_path / "runs/demo/checkpoints/7").mkdir(parents=True)
    assert demo_model.checkpoint() == tmp_path / "runs/demo"
    monkeypatch.setenv("LLAMA_CHECKPOINT", "elsewhere")
    assert demo_model.checkpoint() == Path("elsewhere")


def test_ghost_attention_may_begin_with_the_base_model_of_chat(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    ghost_model = beside_the_notebooks(fresh(tmp_path), "ghost_model")
    of_chat = tmp_path / "runs/chat/seed-0/base"
    last = str(load_recipe(f"{ROOT}/configs/chat/small.py:base_long").train.num_steps)
    (of_chat / "checkpoints" / last).mkdir(parents=True)
    assert ghost_model.base_model() == of_chat

    own = tmp_path / "runs/notebook-ghost/base"
    (own / "checkpoints" / last).mkdir(parents=True)
    assert ghost_model.base_model() == of_chat
    own.with_name("base-256").mkdir()  # its own was begun before
    assert ghost_model.base_model() == own


@pytest.fixture(scope="module")
def ghosts(tmp_path_factory, own_kernels) -> tuple[Path, nbformat.NotebookNode]:
    """A place where ghost_attention.ipynb ran, and what it showed."""
    folder = fresh(tmp_path_factory.mktemp("ghosts"))
    return folder, run(folder / "docs/notebooks/ghost_attention.ipynb")


def kept(notebook: nbformat.NotebookNode) -> dict[str, list[int]]:
    """Instructions kept by both models, in percent, turn by turn, as it was printed."""
    printed = "".join(shown(notebook, "printed"))
    lines = re.findall(r"^(SFT|Ghost Attention) +((?:\d+ *)+)$", printed, re.MULTILINE)
    return {name: [int(share) for share in shares.split()] for name, shares in lines}


def talks(notebook: nbformat.NotebookNode) -> list[str]:
    """The marks of the answers in each talk."""
    marks = re.compile("[✓✗]")
    found = ["".join(marks.findall(text)) for text in shown(notebook, "printed")]
    return [talk for talk in found if talk]


@pytest.mark.slow
def test_ghost_attention(ghosts):
    _, notebook = ghosts
    shares = kept(notebook)
    before, after = shares["SFT"], shares["Ghost Attention"]
    assert len(before) == len(after) == 20
    assert min(before[0], after[0]) >= 80  # the first answer keeps it with both
    for turn in range(6, 21):
        assert after[turn - 1] >= max(80, 2 * before[turn - 1])
    assert talks(notebook) == ["✓✗✗✗✗✗", "✓✓✓✓✓✓"]
    assert len(shown(notebook, "image/png")) == 2


@pytest.mark.slow
def test_ghost_attention_goes_on_where_it_was(ghosts):
    folder, notebook = ghosts
    rows = folder / "runs/notebook-ghost/ghost-all.jsonl"
    written = rows.stat().st_mtime_ns
    again = run(folder / "docs/notebooks/ghost_attention.ipynb")
    assert rows.stat().st_mtime_ns == written
    assert kept(again) == kept(notebook)
    assert talks(again) == talks(notebook)
