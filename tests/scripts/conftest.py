"""The place where what documents say can be typed; see documents.py."""

from pathlib import Path

import pytest

from tests.scripts.documents import make_place

PATHS = (
    "configs",
    "corpus",
    "dialogs",
    "comparisons",
    "prompts",
    "llama-2-7b",
    "runs/demo",
)


@pytest.fixture(scope="session")
def prepared_place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def place(prepared_place, tmp_path, monkeypatch) -> Path:
    """The working directory: what documents name is there, what they write is gone."""
    (tmp_path / "runs").mkdir()
    for name in PATHS:
        (tmp_path / name).symlink_to(prepared_place / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
