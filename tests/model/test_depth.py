"""Rematerialisation: what is saved differs, results and parameters do not."""

import re
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


@pytest.mark.parametrize(
    "remat",
    [name for name in POLICIES if name not in ("none", "offload")]
    + ["projections:1,full"],
)
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

    kept = {
        remat: sum(map(np.prod, kept_shapes(remat)))
        for remat in POLICIES
        if remat != "offload"
    }
    tokens = CONFIG.num_layers * TOKENS.size
    D, F, K = CONFIG.dim, CONFIG.hidden_dim, CONFIG.num_kv_heads * CONFIG.head_dim
    assert kept["full"] == tokens * D
    assert kept["attention"] == tokens * (D + D)
    # The residual stream; q, k, v, attention, out; gate, up.
    assert kept["attention_block"] == tokens * (D + (D + K + K + D + D))
    assert kept["projections"] == kept["attention_block"] + tokens * 2 * F
    assert kept["none"] > kept["projections"]


def test_offload_keeps_the_attention_block_in_the_memory_of_the_host(params):
    """A device keeps the residual stream alone; the host, what is moved there."""
    saved = jax.make_jaxpr(lambda p: jax.vjp(_loss("offload"), p)[1])(params)
    scan = next(e for e in saved.eqns if e.primitive.name == "scan")
    moved = [e for e in scan.params["jaxpr"].eqns if e.primitive.name == "device_put"]
    D, K = CONFIG.dim, CONFIG.num_kv_heads * CONFIG.head_dim
    sizes = sorted(e.outvars[0].aval.size for e in moved)
    assert sizes == sorted(TOKENS.size * width for width in (D, K, K, D, D))
    for equation in moved:
        assert "pinned_host" in str(equation.params) or "Host" in str(equation.params)


def test_policies_change_along_the_depth(params):
    def stacks(remat):
        saved = jax.eval_shape(lambda p: jax.vjp(_loss(remat), p)[1], params)
        shapes = [leaf.shape for leaf in jax.tree.leaves(saved)]
        return [s for s in shapes if s[1:3] == TOKENS.shape]

    rest = CONFIG.num_layers - 1
    lengths = {shape[0] for shape in stacks("projections:1,full")}
    assert lengths == {1, rest}
    wide = (*TOKENS.shape, CONFIG.hidden_dim)
    assert (1, *wide) in stacks("projections:1,full")
    assert (rest, *wide) in stacks("full:1,projections")


@pytest.mark.parametrize(
    "remat, message",
    [
        ("some", "remat 'some' is unknown. It is one of none, projections"),
        ("projection:1,full", "Did you mean 'projections'?"),
        ("full,none", "does not say for how many layers 'full' holds"),
        ("full:0,none", "does not say for how many layers 'full' holds"),
        ("full:1", "ends with a number"),
        ("full:2,none", "names 2 layers before its last policy, and the model has 2"),
    ],
)
def test_what_makes_no_sense_is_refused(params, remat, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        jax.eval_shape(_loss(remat), params)
