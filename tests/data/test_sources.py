import json

import pytest

from llama_jax.data import JsonLines, Records, TextFiles
from llama_jax.data.sources import files
from llama_jax.errors import DataError


def test_json_lines(tmp_path):
    path = tmp_path / "with space ü.jsonl"
    lines = [{"text": "one\ntwo"}, {"other": 1, "text": "naïve 😀"}]
    path.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    documents = JsonLines(path)
    assert list(documents) == ["one\ntwo", "naïve 😀"]
    assert list(documents) == ["one\ntwo", "naïve 😀"]  # as often as one likes
    assert documents.num_skipped == 0


def test_json_lines_with_another_field_and_crlf(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"content": "one"}\r\n\r\n{"content": "two"}\r\n')
    assert list(JsonLines(path, field="content")) == ["one", "two"]


def test_text_files(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text(f"in {path.name}\n", encoding="utf-8")
    assert list(TextFiles("two files", paths)) == ["in a.txt\n", "in b.txt\n"]


def test_records_hold_strings_or_utf8():
    records = [{"text": "naïve"}, {"text": "naïve".encode()}]
    assert list(Records("corpus", records)) == ["naïve", "naïve"]


def test_files_are_told_by_their_endings(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_text("three\nfour\n")
    sources = files([tmp_path / "a.jsonl", str(tmp_path / "b.txt")])
    assert [list(source) for source in sources] == [["one", "two"], ["three\nfour\n"]]
    with pytest.raises(DataError, match=r"c.txt is no file"):
        files([tmp_path / "c.txt"])
