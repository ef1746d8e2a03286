"""A Llama that gives one number at each position."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.build import build
from llama_jax.config import LlamaConfig
from llama_jax.model import Llama, ScalarLlama, num_params, param_axes
from llama_jax.model.count import abstract_params, num_matmul_params
from sharding import MeshConfig, make_mesh, training_rules

CONFIG = LlamaConfig.tiny()
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 16))


@pytest.fixture(scope="module")
def params():
    return ScalarLlama(CONFIG).init(jax.random.key(0), TOKENS)["params"]


def test_the_head_gave_way_to_a_column(params):
    llama = Llama(CONFIG).init(jax.random.key(0), TOKENS)["params"]
    assert set(llama) - set(params) == {"unembed"}
    assert set(params) - set(llama) == {"scalar"}
    assert params["scalar"]["kernel"].shape == (CONFIG.dim,)
    # The same seed makes the same body, whatever it ends with.
    for name in set(llama) & set(params):
        jax.tree.map(np.testing.assert_array_equal, llama[name], params[name])


def test_it_is_the_last_hidden_state_times_the_column(params):
    hidden = ScalarLlama(CONFIG).apply({"params": params}, TOKENS, method="hidden")
    scores = ScalarLlama(CONFIG).apply({"params": params}, TOKENS)
    wide = np.asarray(hidden, np.float64) @ np.asarray(params["scalar"]["kernel"])
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, wide, atol=1e-6)


def test_counts_and_names_are_those_of_the_tree(params):
    assert abstract_params(CONFIG, "scalar") == jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
    )
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    assert num_params(CONFIG, "scalar") == sum(sizes)
    head = CONFIG.dim * (CONFIG.vocab_size - 1)
    assert num_matmul_params(CONFIG, "scalar") == num_matmul_params(CONFIG) - head
    named = jax.tree.map(len, param_axes("scalar"), is_leaf=lambda x: type(x) is tuple)
    assert named == jax.tree.map(lambda leaf: leaf.ndim, params)


@pytest.mark.parametrize(
    "axes", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}]
)
def test_every_mesh_gives_the_numbers_of_one_device(params, axes):
    mesh = make_mesh(MeshConfig(**axes))
    rules = training_rules(sequence_parallel=False)
    config = dataclasses.replace(CONFIG, max_length=16)
    sharded = build(config, mesh, rules, dtype="float32", remat="none", head="scalar")
    expected = ScalarLlama(CONFIG).apply({"params": params}, TOKENS)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharded.param_shardings)
        scores = jax.jit(sharded.model.apply)({"params": placed}, TOKENS)
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        head = sharded.init_head(seed=3)
        whole = sharded.init(seed=3)["scalar"]
    np.testing.assert_array_equal(head["kernel"], whole["kernel"])
