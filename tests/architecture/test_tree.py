"""Rules about files: their names, and what none of them contains."""

import re
import tokenize

import pytest

from tests.architecture.tree import FOLDERS, ROOT, files

PYTHON = [path for path in files() if path.suffix == ".py"]
# Names that say nothing of what is inside.
EMPTY_WORDS = {"utils", "util", "common", "misc", "helper", "helpers"}
# Comments that silence a tool, or put off what is to be done.
SILENCERS = re.compile(
    r"type:\s*ignore|noqa|(?:pyrefly|pyright|ruff|pylint|mypy):|fmt:\s*(?:off|skip)"
    r"|pragma|TODO|FIXME|XXX"
)
# A path that exists on one machine only; `~/` and `$HOME` are for everyone.
MACHINE_PATH = re.compile(r"(?<![\w.$~}>/*-])/(?:home|root|Users|work|tmp)/")
# Sizes in bytes; data belongs to whoever publishes it.
LARGEST_FILE = 200_000


def test_the_rules_would_notice():
    assert SILENCERS.search("# type:" + " ignore[attr-defined]")
    assert SILENCERS.search("# no" + "qa: E501")
    assert MACHINE_PATH.search("see " + "/ho" + "me/someone/data")
    assert not MACHINE_PATH.search("https://example.org/home/page, a/tmp/b")


def test_folders():
    """The top level is fixed; a new folder is a decision."""
    found = {path.relative_to(ROOT).parts[0] for path in PYTHON if path.parent != ROOT}
    assert {"llama_jax", "sharding", "configs", "tests"} <= found
    assert found <= set(FOLDERS)
    assert [path.name for path in PYTHON if path.parent == ROOT] == []


def test_names_say_something():
    assert [
        path for path in PYTHON if EMPTY_WORDS & set(path.stem.strip("_").split("_"))
    ] == []


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_silenced(path):
    with path.open("rb") as file:
        comments = [
            f"{token.start[0]}: {token.string}"
            for token in tokenize.tokenize(file.readline)
            if token.type == tokenize.COMMENT
        ]
    assert [comment for comment in comments if SILENCERS.search(comment)] == []


def test_no_path_of_one_machine():
    found = []
    for path in files():
        if path.suffix not in {".png", ".jpg", ".model"}:
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [
                f"{path.relative_to(ROOT)}:{number}"
                for number, line in enumerate(lines, 1)
                if MACHINE_PATH.search(line)
            ]
    assert found == []


def test_files_are_small():
    assert [path for path in files() if path.stat().st_size > LARGEST_FILE] == []
