"""Faults 20, 22, 23, 25, 26 and 35: data that are damaged, missing or do not fit."""

import itertools
import json
import shutil

import numpy as np
import pytest

from llama_jax.data import (
    JsonLines,
    Prepared,
    Records,
    TextFiles,
    TrainingData,
    ValidationData,
    open_data,
    prepare,
)
from llama_jax.data.batch import batch_rows
from llama_jax.data.sources import MAX_DOCUMENT_BYTES
from llama_jax.errors import DataError
from tests.data.corpus import (
    data_config,
    make_tokenizer,
    prepare_corpus,
    source,
    texts,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    return prepare_corpus(tmp_path_factory.mktemp("whole") / "rows", tokenizer)


@pytest.fixture
def prepared(whole, tmp_path):
    return Prepared.load(shutil.copytree(whole.path, tmp_path / "rows"))


# Prepared data (22).

SHARD = "train-00001-of-00003.array_record"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def garble(path):
    path.write_bytes(bytes(path.stat().st_size))


def swap(path):
    path.write_bytes((path.parent / SHARD.replace("00001-", "00000-")).read_bytes())


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, empty, garble, swap, remove])
def test_a_damaged_shard_is_named_when_opened(prepared, damage):
    damage(prepared.path / SHARD)
    with pytest.raises(DataError, match=f"{SHARD} is (damaged|missing).*prepare"):
        TrainingData(data_config(prepared), batch_size=4)


def test_a_flipped_bit_is_found_when_read(prepared):
    path = prepared.path / SHARD
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{SHARD} is damaged"):
        list(prepared.rows("train"))
    with pytest.raises(DataError, match=f"{SHARD} is damaged"):
        data = TrainingData(data_config(prepared), batch_size=4)
        list(itertools.islice(data, 200))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "is damaged"),
        ("{}", "is damaged.*format"),
        ('{"format": 99}', "is of format 99, and this version reads 1"),
    ],
)
def test_a_damaged_manifest(prepared, content, message):
    (prepared.path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=f"dataset.json.*{message}"):
        Prepared.load(prepared.path)


def test_a_field_missing_in_the_manifest(prepared):
    path = prepared.path / "dataset.json"
    content = json.loads(path.read_text())
    del content["splits"]["train"][0]["num_rows"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="dataset.json is damaged.*num_rows"):
        Prepared.load(path.parent)


def test_no_data_there(tmp_path):
    with pytest.raises(DataError, match="holds no prepared data"):
        Prepared.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="mount the bucket"):
        Prepared.load("gs://bucket/rows")


def test_no_such_split(prepared):
    config = data_config(prepared, validation_split="test")
    with pytest.raises(DataError, match="no split 'test': it has 'train', 'valid"):
        ValidationData(config, batch_size=4)


# Making them (22).


def test_no_documents(tokenizer, tmp_path):
    with pytest.raises(DataError, match="'train' has no sources"):
        prepare({"train": []}, tokenizer, tmp_path / "a", row_length=8)
    sources = [source(texts(3), "first"), source([], "second")]
    with pytest.raises(DataError, match="second holds no documents"):
        prepare({"train": sources}, tokenizer, tmp_path / "a", row_length=8)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file(tokenizer, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.touch()
    with pytest.raises(DataError, match=r"empty\.jsonl holds no documents"):
        prepare({"train": [JsonLines(path)]}, tokenizer, tmp_path / "a", row_length=8)


def test_less_than_a_row(tokenizer, tmp_path):
    with pytest.raises(DataError, match="'train' does not fill one row.*row_length"):
        prepare({"train": [source(["ba"])]}, tokenizer, tmp_path / "a", row_length=99)
    with pytest.raises(DataError, match="row_length is 0"):
        prepare({"train": [source(["ba"])]}, tokenizer, tmp_path / "a", row_length=0)


def test_prepared_otherwise_before(prepared, tokenizer, tmp_path):
    sources = {
        "train": [source(texts(9), "train 0")],
        "validation": [source(texts(9), "a")],
    }
    with pytest.raises(DataError, match="row_length 16, not 8: choose another"):
        prepare(sources, tokenizer, prepared.path, row_length=8)
    with pytest.raises(DataError, match="was prepared from .*'train 1'"):
        prepare(sources, tokenizer, prepared.path, row_length=16)
    (tmp_path / "other").mkdir()
    other = make_tokenizer(tmp_path / "other", vocab_size=380)
    with pytest.raises(DataError, match="another tokenizer"):
        prepare(sources, other, prepared.path, row_length=16)


def test_a_directory_with_other_files_is_left_alone(tokenizer, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DataError, match="holds other files"):
        prepare({"train": [source(texts(9))]}, tokenizer, tmp_path, row_length=8)
    with pytest.raises(DataError, match="holds other files"):
        prepare(
            {"train": [source(texts(9))]},
            tokenizer,
            tmp_path / "thesis.tex",
            row_length=8,
        )


def test_a_directory_that_cannot_be_made(tokenizer, tmp_path):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "rows"
    with pytest.raises(DataError, match="cannot be written"):
        prepare({"train": [source(texts(9))]}, tokenizer, target, row_length=8)


# Rows of text (23).

BAD_LINES = {
    "invalid UTF-8": (b'{"text": "caf\xe9"}', "0xe9, which is not UTF-8"),
    "missing field": (b'{"content": "x"}', "'text' is missing; it has 'content'"),
    "no object": (b'["x"]', "it is list, not an object"),
    "no text": (b'{"text": 7}', "'text' is int, not text"),
    "no JSON": (b'{"text": "x"', "it is not JSON"),
    "nested": (b"[" * 100_000, "nested too deeply"),
    "NUL": (b'{"text": "a\\u0000b"}', "character 1 is NUL"),
    "lone surrogate": (b'{"text": "ab\\ud800"}', "character 2 is a lone surrogate"),
    "empty": (b'{"text": " "}', "the text is empty"),
    "long": (b'{"text": "' + b"x" * 50_000_000 + b'"}', "longer than 10,000,000"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_or_counted(tmp_path, name):
    line, message = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: .*{message}.*skip"):
        list(JsonLines(path))
    documents = JsonLines(path, on_error="skip")
    assert list(documents) == ["one", "two"]
    assert documents.num_skipped == 1


def test_skipped_rows_are_recorded(tokenizer, tmp_path):
    records = [{"text": text} for text in texts(9)] + [{}, {"text": b"\xff"}]
    sources = [Records("corpus", records, on_error="skip")]
    prepared = prepare({"train": sources}, tokenizer, tmp_path / "a", row_length=8)
    assert prepared.splits["train"].num_skipped == 2
    assert prepared.splits["train"].num_documents == 9


def test_a_bad_text_file_is_named(tmp_path):
    good, bad, long = (tmp_path / f"{name}.txt" for name in ("good", "bad", "long"))
    good.write_text("good")
    bad.write_bytes(b"\xff\xfe")
    long.write_bytes(b"x" * (MAX_DOCUMENT_BYTES + 1))
    with pytest.raises(DataError, match=r"bad\.txt: byte 0 is 0xff"):
        list(TextFiles("files", [good, bad]))
    documents = TextFiles("files", [bad, good, long], on_error="skip")
    assert list(documents) == ["good"] and documents.num_skipped == 2


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"no\.jsonl does not exist"):
        list(JsonLines(tmp_path / "no.jsonl", on_error="skip"))
    with pytest.raises(DataError, match="cannot be read"):
        list(JsonLines(tmp_path))
    with pytest.raises(DataError, match=r"no\.txt does not exist"):
        list(TextFiles("files", [tmp_path / "no.txt"]))


# What does not fit the run (20, 25, 26, 35).


def test_sequences_of_another_length(prepared):
    with pytest.raises(DataError, match="rows of 16 tokens, and sequence_length is 8"):
        open_data(data_config(prepared, sequence_length=8))


def test_another_tokenizer(prepared, tmp_path):
    prepared.require_tokenizer(prepared.tokenizer)
    with pytest.raises(DataError, match=f"{prepared.path} was made with another"):
        prepared.require_tokenizer("0" * 64)
    (tmp_path / "other").mkdir()
    tokenizer = make_tokenizer(tmp_path / "other", vocab_size=380)
    other = prepare_corpus(tmp_path / "other" / "rows", tokenizer)
    with pytest.raises(DataError, match="other/rows was made with another tokenizer"):
        open_data(data_config(prepared, other))


@pytest.mark.parametrize("batch_size", [0, 10])
def test_a_batch_that_does_not_split_over_hosts(prepared, batch_size):
    message = (
        f"a batch of {batch_size} rows .* 4 hosts: choose a positive multiple of 4"
    )
    for data in (TrainingData, ValidationData):
        with pytest.raises(DataError, match=message):
            data(data_config(prepared), batch_size=batch_size, num_hosts=4)


def test_a_negative_position(prepared):
    with pytest.raises(DataError, match="position is -8"):
        TrainingData(data_config(prepared), batch_size=8, position=-8)


def test_a_batch_of_nothing_weighs_nothing():
    batch = batch_rows([np.empty(0, int)] * 2, length=4)
    assert batch.weights.sum() == 0
    assert batch.tokens.shape == (2, 4)
