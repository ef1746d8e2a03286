"""Work kept on disk: whole files, gone on with, and no other work in their place."""

import json
import os

import jax
import pytest
from etils import epath

from llama_jax.errors import ConfigError, DataError
from llama_jax.finetune import shards
from llama_jax.finetune.shards import Kind, Shards, Written, write_rows

KIND = Kind(
    article="a", noun="list", manifest="list.json", files="rows", count="num_words"
)
WORDS = ["ba", "ce", "di", "fo", "gu"]
PLAN = {"num_words": 5, "batch_size": 2, "seed": 7}


class KilledError(Exception):
    pass


def ignore(done, total):
    pass


def rows_of(numbers):
    """Words become rows of themselves, those with an i and their neighbours none."""
    return [{"word": WORDS[i]} for i in numbers if i not in (2, 3)]


def written(path, *, make=rows_of, watch=ignore, **changes):
    return write_rows(KIND, path, PLAN | changes, make, watch)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "whole"
    written(path)
    return path


def test_what_is_written(tmp_path):
    told = []
    path = tmp_path / "new" / "list"
    made = written(path, watch=lambda done, total: told.append((done, total)))
    assert made == Written(epath.Path(path), num_items=5, num_rows=3)
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert json.loads((path / "list.json").read_text()) == PLAN
    files = {name: text for name, text in content(path).items() if name != "list.json"}
    assert files == {
        "rows-00000-of-00003.jsonl": b'{"word": "ba"}\n{"word": "ce"}\n',
        "rows-00001-of-00003.jsonl": b"",
        "rows-00002-of-00003.jsonl": b'{"word": "gu"}\n',
    }


@pytest.mark.parametrize("place", range(1, 9))
def test_killed_at_any_place_it_ends_as_it_would_have(
    place, whole, tmp_path, monkeypatch
):
    """Each file is synced, and then its directory: the manifest's and three others."""
    real, calls = os.fsync, 0

    def killed(descriptor):
        nonlocal calls
        calls += 1
        if calls == place:
            raise KilledError
        real(descriptor)

    path = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(os, "fsync", killed)
        written(path)
    for name, text in content(path).items():
        assert name.startswith(".") or text == content(whole)[name]
    assert written(path).num_rows == 3
    assert content(path) == content(whole)


def test_what_is_there_is_not_made_again(whole):
    (whole / "rows-00001-of-00003.jsonl").unlink()
    asked = []

    def make(numbers):
        asked.append(numbers)
        return rows_of(numbers)

    assert written(whole, make=make).num_rows == 3
    assert asked == [range(2, 4)]


def test_a_directory_that_was_begun_otherwise(whole):
    before = content(whole)
    with pytest.raises(
        DataError,
        match=r"holds a list that was begun otherwise: seed was 7 and is 8\. Choose",
    ):
        written(whole, seed=8)
    with pytest.raises(DataError, match="num_words was 5 and is 4; temperature was No"):
        written(whole, num_words=4, temperature=1.0)
    assert content(whole) == before


def test_what_made_nothing_binds_no_one(tmp_path):
    """As where it did not fit into memory, and is given again with smaller batches."""

    def exhausted(numbers):
        raise MemoryError

    path = tmp_path / "new"
    with pytest.raises(MemoryError):
        written(path, make=exhausted, batch_size=4)
    assert written(path, batch_size=1).num_rows == 3
    assert json.loads((path / "list.json").read_text())["batch_size"] == 1


def test_a_directory_that_this_host_does_not_share(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)  # which writes nothing
    monkeypatch.setattr(shards, "_SECONDS_TO_SHOW", 1)
    made = []
    with pytest.raises(DataError, match="list.json was .*, and host 1 does not see it"):
        written(tmp_path / "new", make=made.append)
    assert not made


def test_a_directory_of_something_else(tmp_path):
    (tmp_path / ".hidden").write_text("")
    written(tmp_path)
    (tmp_path / "list.json").unlink()
    with pytest.raises(DataError, match="other files: give each list a directory of"):
        written(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="list.json cannot be written"):
        written(tmp_path / "file" / "list")


def test_damaged_files(whole):
    file = whole / "rows-00002-of-00003.jsonl"
    file.write_text(file.read_text()[:-4])
    with pytest.raises(DataError, match=r"03.jsonl is damaged .* remove .*jsonl, and"):
        written(whole)
    (whole / "list.json").write_text("[")
    with pytest.raises(DataError, match=r"list.json is damaged .* remove .*whole, and"):
        written(whole)
    (whole / "list.json").write_text('{"num_words": 0, "batch_size": 2}')
    with pytest.raises(DataError, match="it counts no words"):
        written(whole)


def test_facts_that_a_manifest_must_have(whole):
    kind = KIND._replace(facts=("model",))
    assert shards.read_plan(KIND, epath.Path(whole)) == PLAN
    with pytest.raises(DataError, match="is damaged .it is not what was written"):
        shards.read_plan(kind, epath.Path(whole))


def test_batches_are_named_and_counted(tmp_path):
    some = Shards(KIND, epath.Path(tmp_path), PLAN)
    assert [some.items(n) for n in range(some.num_files)] == [
        range(0, 2),
        range(2, 4),
        range(4, 5),
    ]
    assert some.file(1).name == "rows-00001-of-00003.jsonl"
    assert some.finished() == []


def test_dialogs_are_told_apart_by_what_they_say():
    dialog = [{"role": "user", "content": "Hi"}]
    noted = [{"content": "Hi", "role": "user", "note": "x"}]
    assert shards.digest_dialogs([dialog]) == shards.digest_dialogs([noted])
    assert shards.digest_dialogs([dialog]) != shards.digest_dialogs([dialog, dialog])


@pytest.mark.parametrize("value", [0, -1, 1.0, True])
def test_counts(value):
    shards.require_counts(batch_size=1)
    with pytest.raises(ConfigError, match=f"batch_size is {value}: give an integer of"):
        shards.require_counts(batch_size=value)
