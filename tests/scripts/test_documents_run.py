"""What README.md and docs/ say can be typed; docs/README.md states the conventions."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax import cli
from tests.architecture.tree import ROOT
from tests.scripts.documents import commands, documents, program

# Commands of others, which cannot be run dry, or not without a network.
OTHERS = {"git", "pip", "source"}
DOCUMENTS = pytest.mark.parametrize(
    "document", documents(), ids=lambda path: str(path.relative_to(ROOT))
)


def test_blocks_are_found():
    text = "a\n```python\nx = 1\n```\n```bash\nmake demo  # all\nls \\\n  b\n```\n"
    assert program(text).split("\n") == ["", "", "x = 1", "", "", "", "", "", ""]
    assert list(commands(text)) == [(["make", "demo"], "all"), (["ls", "b"], "")]


@DOCUMENTS
def test_python_blocks_run(document, place):
    source = program(document.read_text(encoding="utf-8"))
    exec(compile(source, str(document), "exec"), {"__name__": document.stem})


@DOCUMENTS
def test_commands_run_dry(document, place, capsys, monkeypatch):
    programs = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for words, comment in commands(document.read_text(encoding="utf-8")):
        match words:
            case ["llama-jax", *rest]:
                status = cli.main([*rest, "--dry-run"])
                said = capsys.readouterr().err
                assert status == int(comment == "refused"), (words, said)
            case ["make", *_]:
                subprocess.run([*words, "-n"], cwd=ROOT, check=True)
            case [path, *rest] if path.endswith(".sh"):
                assert "--dry-run" in rest
                subprocess.run([ROOT / path, *rest], check=True)
            case [path, *_] if (ROOT / path).is_file():
                pass
            case _:
                assert words[0] in OTHERS, words


@DOCUMENTS
def test_names_exist(document):
    """Files, tests and symbols that stand between backticks."""
    spec = importlib.util.spec_from_file_location("check", ROOT / "docs/check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    missing = []
    for name in re.findall(r"`([\w./:-]+)`", document.read_text(encoding="utf-8")):
        path, _, function = name.partition("::")
        if function:
            known = check.is_test(name)
        elif re.match(r"(llama_jax|sharding|tests|configs|docs|scripts)/", path):
            known = (ROOT / path.partition(":")[0]).exists()
        elif re.match(r"(llama_jax|sharding)\.\w", path):
            known = check.is_symbol(name)
        else:
            continue
        if not known:
            missing.append(name)
    assert missing == []
