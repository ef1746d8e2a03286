"""One tokenizer and one prepared corpus, made once for all tests of the data."""

import pytest

from llama_jax.data import Prepared
from llama_jax.text import Tokenizer
from tests.data import corpus


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return corpus.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tokenizer) -> Prepared:
    return corpus.prepare_corpus(tmp_path_factory.mktemp("data") / "rows", tokenizer)
