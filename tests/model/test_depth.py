"""Rematerialisation: what is saved differs, results and parameters do not."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config.model import LlamaConfig
from llama_jax.config.train import Remat
from llama_jax.errors import ConfigError
from llama_jax.model import Llama

CONFIG = LlamaConfig.tiny()
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 8)))
POLICIES = get_args(Remat)


def _loss(remat):
    model = Llama(CONFIG, remat=remat)
    return lambda params: jnp.mean(model.apply({"params": params}, TOKENS) ** 2)


@pytest.fixture(scope="module")
def params():
    return jax.jit(Llama(CONFIG).init)(jax.random.key(0), TOKENS)["params"]


@pytest.fixture(scope="module")
def plain(params):
    return jax.jit(jax.value_and_grad(_loss("none")))(params)


@pytest.mark.parametrize("remat", [name for name in POLICIES if name != "none"])
def test_loss_gradients_and_the_tree_are_the_same(remat, params, plain):
    shapes = jax.eval_shape(Llama(CONFIG, remat=remat).init, jax.random.key(0), TOKENS)
    assert jax.tree.structure(shapes["params"]) == jax.tree.structure(params)
    loss, gradient = jax.jit(jax.value_and_grad(_loss(remat)))(params)
    np.testing.assert_allclose(loss, plain[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=1e-5 * np.abs(b).max()
        ),
        gradient,
        plain[1],
    )


def test_each_saves_what_it_says(params):
    """Floats kept between forward and backward pass, for each token and layer."""

    def kept_shapes(remat):
        saved = jax.eval_shape(lambda p: jax.vjp(_loss(remat), p)[1], params)
        given = [leaf.shape for leaf in jax.tree.leaves(params)]
        shapes = [leaf.shape for leaf in jax.tree.leaves(saved)]
        for shape in given:
            if shape in shapes:
                shapes.remove(shape)
        return [s for s in shapes if s[:3] == (CONFIG.num_layers, *TOKENS.shape)]

    kept = {remat: sum(map(np.prod, kept_shapes(remat))) for remat in POLICIES}
    tokens = CONFIG.num_layers * TOKENS.size
    D, F, K = CONFIG.dim, CONFIG.hidden_dim, CONFIG.num_kv_heads * CONFIG.head_dim
    assert kept["full"] == tokens * D
    assert kept["attention"] == tokens * (D + D)
    # The residual stream; q, k, v, attention, out; gate, up.
    assert kept["projections"] == tokens * (D + (D + K + K + D + D) + 2 * F)
    assert kept["none"] > kept["projections"]


def test_an_unknown_policy_is_refused(params):
    with pytest.raises(ConfigError, match="remat 'some' is unknown: use .*projections"):
        jax.eval_shape(_loss("some"), params)
