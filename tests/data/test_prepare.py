import dataclasses
import math

import numpy as np
import pytest

from llama_jax.data import Prepared, prepare
from llama_jax.data.prepared import id_type
from tests.data.corpus import LENGTH, prepare_corpus, source, texts


def read(prepared, split):
    return [row.tolist() for row in prepared.rows(split)]


def test_rows_are_the_documents_between_bos_and_eos(prepared, tokenizer):
    stream = [
        token
        for text in texts(7, seed=1)[:4]
        for token in tokenizer.encode(text, bos=True, eos=True)
    ]
    num_rows = math.ceil((len(stream) - 1) / LENGTH)
    rows = read(prepared, "validation")[:num_rows]
    assert [token for row in rows for token in row[:-1]] == stream[:-1]
    assert rows[-1][-1] == tokenizer.eos_id
    assert stream[0] == tokenizer.bos_id


def test_counts(prepared, tokenizer):
    split = prepared.splits["validation"]
    documents = texts(7, seed=1)
    encoded = [tokenizer.encode(text, bos=True, eos=True) for text in documents]
    assert split.num_documents == 7
    assert split.text_bytes == sum(len(text.encode()) for text in documents)
    assert split.num_tokens == sum(map(len, encoded))
    assert split.num_targets == split.num_tokens - 2  # the first of each shard
    assert split.num_skipped == split.num_too_long == 0
    assert split.num_rows == len(prepared.rows("validation"))


def test_training_drops_the_tail_and_says_how_much(prepared):
    split = prepared.splits["train"]
    rows = read(prepared, "train")
    assert {len(row) for row in rows} == {LENGTH + 1}
    assert split.num_targets == len(rows) * LENGTH
    num_dropped = split.num_tokens - len(split.shards) - split.num_targets
    assert 0 < num_dropped < LENGTH * len(split.shards)


def test_what_is_written_is_read_again(prepared):
    assert Prepared.load(prepared.path) == prepared
    assert Prepared.load(prepared.path).digest == prepared.digest


def test_the_same_corpus_gives_the_same_digest(prepared, tokenizer, tmp_path):
    assert prepare_corpus(tmp_path / "again", tokenizer).digest == prepared.digest
    other = prepare_corpus(tmp_path / "other", tokenizer, seed=7)
    assert other.digest != prepared.digest


def test_a_second_time_changes_nothing(tokenizer, tmp_path):
    first = prepare_corpus(tmp_path / "rows", tokenizer)
    before = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    assert prepare_corpus(tmp_path / "rows", tokenizer) == first
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == before


def test_an_interrupted_run_leaves_nothing(tokenizer, tmp_path):
    class Interrupted:
        name, num_skipped = "interrupted", 0

        def __iter__(self):
            yield from texts(5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare({"train": [Interrupted()]}, tokenizer, tmp_path / "d", row_length=8)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared(tokenizer, tmp_path):
    (tmp_path / ".rows.partial").mkdir()
    (tmp_path / ".rows.partial" / "train-00000-of-00009.array_record").touch()
    prepare_corpus(tmp_path / "rows", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
    assert len(list((tmp_path / "rows").glob("train-*"))) == 3


def test_a_shard_too_small_for_a_row_is_empty(tokenizer, tmp_path):
    sources = [source(["ba"], "small"), source(texts(9), "large")]
    prepared = prepare({"train": sources}, tokenizer, tmp_path / "d", row_length=64)
    small, large = prepared.splits["train"].shards
    assert small.num_rows == 0 and large.num_rows == len(prepared.rows("train")) > 0


def test_ids_are_as_small_as_the_vocabulary_allows(prepared):
    assert id_type(2**16) == np.uint16 and id_type(2**16 + 1) == np.uint32
    assert prepared.vocab_size == 400
    assert all(row.dtype == np.int32 for row in prepared.rows("train"))


def test_every_setting_is_recorded(prepared):
    for field in ("tokenizer", "vocab_size", "bos_id", "row_length", "splits", "kind"):
        changed = dataclasses.replace(
            prepared, **{field: {} if field == "splits" else "x"}
        )
        assert changed.digest != prepared.digest, field
