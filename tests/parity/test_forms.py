"""One computation in several forms: scan and loop, cache and whole, packed and not."""

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.generate.weights import from_params
from llama_jax.model import Llama, layers, mask
from llama_jax.model.decoder import Decoder
from llama_jax.model.transformer import Block, unconstrained
from sharding import MeshConfig
from tests.parity import tolerances
from tests.parity.conftest import (
    CONFIG,
    make_batch,
    place,
    require_close,
    require_same,
    start,
    train,
)

MODEL = Llama(CONFIG)


def _logits(params, tokens, segments=None):
    return jax.jit(MODEL.apply)({"params": params}, jnp.asarray(tokens), segments)


def test_scan_is_the_loop_over_layers(params):
    x = np.random.default_rng(2).normal(size=(2, 6, CONFIG.dim)).astype(np.float32)
    tokens = make_batch(0, rows=2, length=6).tokens
    pattern = mask.causal(6)
    block = Block(CONFIG, unconstrained, layers.attend)

    def scanned(params):
        return jnp.sum(MODEL.apply({"params": params}, tokens, method="hidden") * x)

    def looped(params):
        stream = params["embed"]["table"][tokens]
        angle = layers.rotary_angles(
            jnp.arange(6)[None], head_dim=CONFIG.head_dim, theta=CONFIG.rope_theta
        )
        for number in range(CONFIG.num_layers):
            layer = jax.tree.map(lambda leaf, i=number: leaf[i], params["blocks"])
            stream = block.apply({"params": layer}, stream, angle, pattern)
        scale = params["final_norm"]["scale"]
        return jnp.sum(layers.rms_norm(stream, scale, eps=CONFIG.norm_eps) * x)

    (scan_sum, scan_gradient), (loop_sum, loop_gradient) = (
        jax.jit(jax.value_and_grad(form))(params) for form in (scanned, looped)
    )
    np.testing.assert_allclose(scan_sum, loop_sum, rtol=1e-5)
    del scan_gradient["unembed"], loop_gradient["unembed"]  # neither form uses it
    require_close(
        scan_gradient, loop_gradient, relative=tolerances.ORDER_GRADIENT_RELATIVE
    )


def test_the_cache_gives_what_the_whole_row_gives(params):
    """Prompts of three lengths, padded at the end, then five tokens one by one."""
    lengths, num_new, width = np.array([3, 7, 1]), 5, 8
    rows = make_batch(3, rows=3, length=width + num_new).tokens
    whole = np.asarray(_logits(params, rows))

    decoder, sharded = Decoder(CONFIG), place(MeshConfig(), num_devices=1)
    tree = from_params(sharded, jax.tree.map(jnp.asarray, params), int8=False)

    @jax.jit
    def extend(tokens, cache, start):
        hidden, cache = decoder.extend(tree, tokens, cache, start)
        return decoder.unembed(tree, hidden), cache

    cache = decoder.empty_cache(3, 16, jnp.dtype("float32"))
    padded = np.where(np.arange(width) < lengths[:, None], rows[:, :width], 0)
    logits, cache = extend(padded, cache, jnp.int32(0))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            logits[row, :length],
            whole[row, :length],
            rtol=0,
            atol=tolerances.ORDER_LOGITS,
        )
    for number in range(num_new):
        places = lengths + number
        token = np.take_along_axis(rows, places[:, None], axis=1)
        logits, cache = extend(token, cache, jnp.asarray(places, jnp.int32))
        np.testing.assert_allclose(
            logits[:, 0],
            whole[np.arange(3), places],
            rtol=0,
            atol=tolerances.ORDER_LOGITS,
        )


def test_documents_packed_in_a_row_are_as_if_alone(params):
    first, second = make_batch(4, rows=1, length=11).tokens[0, :5], np.arange(6)
    packed = np.concatenate([first, second]).astype(np.int32)[None]
    segments = np.array([[7] * 5 + [8] * 6], np.int32)
    # Alone, each is followed by zeros, which nothing before them sees.
    alone = np.zeros((2, 11), np.int32)
    alone[0, :5], alone[1, :6] = first, second
    apart, together = _logits(params, alone), _logits(params, packed, segments)
    tolerance = {"rtol": 0, "atol": tolerances.ORDER_LOGITS}
    np.testing.assert_allclose(together[0, :5], apart[0, :5], **tolerance)
    np.testing.assert_allclose(together[0, 5:], apart[1, :6], **tolerance)
    joined = _logits(params, packed)
    assert np.abs(joined[0, 5:] - apart[1, :6]).max() > 1e-2, "segments do nothing"


def test_accumulation_is_the_whole_batch(alone, params):
    """On another mesh besides; the two parts have different numbers of tokens."""
    weights = make_batch(0).weights
    assert weights[0::2].sum() > 2 * weights[1::2].sum() > 0
    sharded = place(MeshConfig(fsdp=4, tensor=2), num_devices=8)
    trained = train(sharded, start(sharded, params), accumulate=2)
    require_same(trained, alone)
