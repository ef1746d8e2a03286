"""Prepared data, and one whole run that others are held against."""

from pathlib import Path

import pytest

from llama_jax.train.pretrain import pretrain
from tests import runs
from tests.data import corpus


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run-data")
    tokenizer = corpus.make_tokenizer(directory)
    return corpus.prepare_corpus(directory / "rows", tokenizer).path


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory) -> Path:
    """The work directory of a run from the first step to the last."""
    workdir = tmp_path_factory.mktemp("whole")
    assert pretrain(runs.recipe(data), workdir)
    return workdir
