"""The modules: parameters, types, parts that make the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.conversion.names import PARAMETERS, axis_sizes
from llama_jax.model import Llama, param_axes
from tests.model.equations import equations

CONFIG = LlamaConfig.tiny()
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 6)))


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Llama(CONFIG).init)(jax.random.key(0), TOKENS)


@pytest.fixture(scope="module")
def logits(variables):
    return jax.jit(Llama(CONFIG).apply)(variables, TOKENS)


def _by_path(tree, is_leaf=None):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    }


@pytest.mark.smoke
def test_logits(logits):
    assert logits.shape == (2, 6, CONFIG.vocab_size)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    assert float(jnp.std(logits)) > 0.01


def test_parameters_are_the_one_collection_and_their_names_are_the_tables(variables):
    assert variables.keys() == {"params"}
    leaves = _by_path(variables["params"])
    sizes = axis_sizes(CONFIG)
    assert {path: leaf.shape for path, leaf in leaves.items()} == {
        parameter.path: tuple(sizes[axis] for axis in parameter.axes)
        for parameter in PARAMETERS
    }
    assert all(leaf.dtype == jnp.float32 for leaf in leaves.values())
    applied, changed = jax.eval_shape(
        lambda: Llama(CONFIG).apply(variables, TOKENS, mutable=True)
    )
    assert applied.shape == (2, 6, 256)
    assert changed.keys() <= {"params"}


def test_every_parameter_has_its_axes(variables):
    names = _by_path(param_axes(), is_leaf=lambda node: isinstance(node, tuple))
    leaves = _by_path(variables["params"])
    assert names.keys() == leaves.keys()
    letters = {
        "V": "vocab",
        "D": "embed",
        "L": "layers",
        "N": "heads",
        "K": "kv_heads",
        "F": "mlp",
        "H": None,
    }
    for parameter in PARAMETERS:
        expected = tuple(letters[letter] for letter in parameter.axes)
        if parameter.path.endswith("scale"):  # a norm's scale is whole everywhere
            expected = tuple(None if name == "embed" else name for name in expected)
        assert names[parameter.path] == expected


def test_initial_values(variables):
    for path, leaf in _by_path(variables["params"]).items():
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1.0)
            continue
        assert float(leaf.std()) == pytest.approx(0.02, rel=0.1), path
        assert abs(float(leaf.mean())) < 0.002, path
        if path.startswith("blocks"):
            correlation = np.corrcoef(leaf[0].ravel(), leaf[1].ravel())[0, 1]
            assert abs(correlation) < 0.1, f"{path}: two layers start alike"


def test_hidden_then_unembed_is_the_whole(variables, logits):
    @jax.jit
    def in_two(variables):
        hidden = Llama(CONFIG).apply(variables, TOKENS, method="hidden")
        return hidden, Llama(CONFIG).apply(variables, hidden, method="unembed")

    hidden, unembedded = in_two(variables)
    assert hidden.shape == (2, 6, CONFIG.dim)
    np.testing.assert_allclose(unembedded, logits, rtol=0, atol=1e-6)
    # After the last norm, whose scale is 1.
    np.testing.assert_allclose(jnp.square(hidden).mean(-1), 1.0, rtol=0.1)


def test_no_token_sees_a_later_one(variables, logits):
    changed = TOKENS.at[:, 4].set((TOKENS[:, 4] + 1) % 256)
    after = jax.jit(Llama(CONFIG).apply)(variables, changed)
    np.testing.assert_array_equal(after[:, :4], logits[:, :4])
    assert (np.abs(after[:, 4:] - logits[:, 4:]).max(axis=2) > 1e-4).all()


def test_bfloat16_computes_in_bfloat16_over_float32_parameters(variables, logits):
    model = Llama(CONFIG, dtype=jnp.dtype("bfloat16"))
    hidden = jax.eval_shape(
        lambda v: model.apply(v, TOKENS, method="hidden"), variables
    )
    assert hidden.dtype == jnp.bfloat16
    low = jax.jit(model.apply)(variables, TOKENS)
    assert low.dtype == jnp.float32
    assert 1e-5 < np.abs(low - logits).max() < 0.02

    shapes = jax.eval_shape(jax.grad(lambda v: model.apply(v, TOKENS).sum()), variables)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", None)]
)
def test_float32_products_are_not_cut_to_bfloat16(variables, dtype, precision):
    """A TPU does that by default, in forward and in backward pass."""
    model = Llama(CONFIG, dtype=jnp.dtype(dtype))
    program = jax.make_jaxpr(jax.grad(lambda v: model.apply(v, TOKENS).sum()))(
        variables
    )
    products = [
        equation
        for equation in equations(program.jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    assert len(products) >= 3 * 9  # forward and both gradients of seven, and attention
    for product in products:
        found = product.params["precision"]
        assert (found and found[0].name) == precision


def test_another_attention_kernel_plugs_in(variables, logits):
    calls = []

    def mean_of_values(q, k, v, mask):
        calls.append((q.shape, k.shape, v.shape, mask.allowed().shape))
        return jnp.repeat(v, CONFIG.group_size, axis=2)

    other = Llama(CONFIG, attend=mean_of_values).apply(variables, TOKENS)
    assert calls[0] == ((2, 6, 8, 8), (2, 6, 4, 8), (2, 6, 4, 8), (1, 6, 6))
    assert np.abs(other - logits).max() > 1e-4
