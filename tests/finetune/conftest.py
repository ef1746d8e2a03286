"""What fine-tuning begins with: a tokenizer, and a model that nobody trained."""

import pytest

from llama_jax.build import build
from llama_jax.checkpoint.params import save_params
from sharding import MeshConfig, make_mesh, training_rules
from tests import runs
from tests.data import corpus


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return corpus.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def untrained(tmp_path_factory, tokenizer):
    """The checkpoint of a model of random weights, with its tokenizer."""
    return save_untrained(tmp_path_factory.mktemp("untrained") / "params", tokenizer)


def chat_model():
    mesh, rules = make_mesh(MeshConfig(fsdp=8)), training_rules(sequence_parallel=False)
    config = runs.recipe("data").model
    return build(config, mesh, rules, dtype="float32", remat="none")


def save_untrained(path, tokenizer):
    model = chat_model()
    save_params(path, model.init(seed=3), model.config, tokenizer)
    return path
