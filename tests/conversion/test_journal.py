"""What a stopped conversion left is taken up, unless it was of another task."""

import json
import os

import pytest
from etils import epath

from llama_jax.conversion.journal import JOURNAL, Journal
from llama_jax.errors import CheckpointError

TASK = {"to": "hf", "source": "a place with späces"}


@pytest.fixture
def place(tmp_path):
    return epath.Path(tmp_path)


def left(place, *names) -> None:
    journal = Journal(place, TASK)
    for name in names:
        journal.add(name, f"digest of {name}")
    journal.close()


def test_what_is_done_is_remembered(place):
    left(place, "a", "b")
    left(place, "c")
    journal = Journal(place, TASK)
    assert list(journal.done) == ["a", "b", "c"]
    assert journal.done["b"] == "digest of b"
    journal.forget("b")
    journal.add("b", "another digest")
    journal.close()
    again = Journal(place, TASK)
    assert again.done["b"] == "another digest"
    again.close()


def test_a_line_that_was_being_written_is_no_loss(place):
    left(place, "a", "b")
    whole = (place / JOURNAL).read_bytes()
    for cut in range(1, 20):
        (place / JOURNAL).write_bytes(whole[:-cut])
        journal = Journal(place, TASK)
        assert list(journal.done) == ["a"]
        journal.add("c", "digest")
        journal.close()
        again = Journal(place, TASK)
        assert list(again.done) == ["a", "c"]
        again.close()


def test_another_task_finds_an_empty_place(place):
    left(place, "a")
    (place / "weights").write_text("some")
    (place / "folder").mkdir()
    (place / "folder" / "more").write_text("some")
    journal = Journal(place, TASK | {"to": "meta"})
    assert journal.done == {}
    assert os.listdir(place) == [JOURNAL]
    journal.close()
    first = (place / JOURNAL).read_text().splitlines()[0]
    assert json.loads(first) == TASK | {"to": "meta"}


def test_one_at_a_time(place):
    journal = Journal(place, TASK)
    with pytest.raises(CheckpointError, match="being written by another conversion"):
        Journal(place, TASK)
    journal.close()
    Journal(place, TASK).close()
