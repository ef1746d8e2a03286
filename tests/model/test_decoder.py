"""The model as generation runs it is the model: whole rows, pieces, int8, attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.generate.weights import to_params
from llama_jax.model import Llama, layers, mask
from llama_jax.model.decoder import Decoder, multiply
from llama_jax.model.int8 import Quantized
from tests.generate.models import LONG, model, weights
from tests.model.equations import equations
from tests.parity.tolerances import (
    BFLOAT16_MULTIPLE,
    INT8_LOGITS,
    ORDER_LOGITS,
    ORDER_RELATIVE,
)

SLOTS = 100
TOKENS = np.random.default_rng(0).integers(0, LONG.vocab_size, (3, 90), np.int32)
DECODER = Decoder(LONG, least_slots=8)


@functools.partial(jax.jit, static_argnums=0)
def _extend(decoder, tree, tokens, cache, start, wanted):
    x, cache = decoder.extend(tree, tokens, cache, start, wanted_B=wanted)
    return decoder.unembed(tree, x), cache


def extend(tokens, cache, start, *, wanted=None, decoder=DECODER):
    """Logits of new positions, and the longer cache."""
    return _extend(decoder, weights(), tokens, cache, start, wanted)


@functools.partial(jax.jit, static_argnums=0)
def _logits(decoder, tree, tokens):
    return decoder.unembed(tree, decoder.hidden(tree, tokens))


@functools.cache
def whole():
    """Logits of whole rows."""
    return np.asarray(_logits(DECODER, weights(), TOKENS))


def close(found, expected, *, within=ORDER_LOGITS):
    np.testing.assert_allclose(found, expected, rtol=ORDER_RELATIVE, atol=within)


def test_whole_rows_are_those_of_the_module():
    sharded, params = model()
    for given in (params, to_params(sharded, weights())):
        close(jax.jit(Llama(LONG).apply)({"params": given}, TOKENS), whole())


@pytest.mark.parametrize("least_slots", [8, pytest.param(256, marks=pytest.mark.slow)])
def test_pieces_of_rows_are_the_whole(least_slots):
    """Some positions at once, then one by one, from cache prefixes of several sizes."""
    decoder = dataclasses.replace(DECODER, least_slots=least_slots)
    cache = decoder.empty_cache(3, SLOTS, jnp.dtype("float32"))
    for start, stop in ((0, 40), (40, 80), *((at, at + 1) for at in range(80, 90))):
        part = TOKENS[:, start:stop]
        logits, cache = extend(part, cache, jnp.int32(start), decoder=decoder)
        close(logits, whole()[:, start:stop])


def test_rows_at_places_of_their_own_are_the_whole():
    """Prompts of three lengths, padded at the end, then ten tokens one by one."""
    lengths = np.array([3, 33, 1], np.int32)
    cache = DECODER.empty_cache(3, SLOTS, jnp.dtype("float32"))
    padded = np.where(np.arange(40) < lengths[:, None], TOKENS[:, :40], 7)
    logits, cache = extend(padded, cache, jnp.int32(0))
    for row, length in enumerate(lengths):
        close(logits[row, :length], whole()[row, :length])
    for places in (lengths + number for number in range(10)):
        token = np.take_along_axis(TOKENS, places[:, None], axis=1)
        logits, cache = extend(token, cache, jnp.asarray(places))
        close(logits[:, 0], whole()[np.arange(3), places])


def test_queries_that_are_filled_up_are_the_whole(monkeypatch):
    """As on a TPU: the few queries of a key head are multiplied as eight."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args)
    )
    cache = DECODER.empty_cache(3, SLOTS, jnp.dtype("float32"))
    _, cache = DECODER.extend(weights(), TOKENS[:, :40], cache, jnp.int32(0))
    places = np.array([40, 39, 3])
    token = np.take_along_axis(TOKENS, places[:, None], axis=1)
    one = functools.partial(DECODER.extend, weights(), token, cache)
    x, _ = one(jnp.asarray(places))
    close(DECODER.unembed(weights(), x)[:, 0], whole()[np.arange(3), places])
    products = [
        equation.outvars[0].aval.shape
        for equation in equations(jax.make_jaxpr(one)(jnp.asarray(places)).jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    assert (3, LONG.num_kv_heads, 8, SLOTS) in products


def test_positions_that_are_read_twice_change_nothing():
    cache = DECODER.empty_cache(3, SLOTS, jnp.dtype("float32"))
    _, cache = extend(TOKENS[:, :40], cache, jnp.int32(0))
    logits, cache = extend(TOKENS[:, 10:50], cache, jnp.int32(10))
    close(logits, whole()[:, 10:50])
    logits, _ = extend(TOKENS[:, 50:90], cache, jnp.int32(50))
    close(logits, whole()[:, 50:90])


def test_the_positions_that_are_wanted_are_those_of_the_whole():
    cache = DECODER.empty_cache(3, SLOTS, jnp.dtype("float32"))
    first, second = np.array([39, 0, 7]), np.array([1, 38, 39])
    rows = np.arange(3)
    for start, wanted in ((0, first), (40, second)):
        logits, cache = extend(
            TOKENS[:, start : start + 40], cache, jnp.int32(start), wanted=wanted
        )
        close(logits[:, 0], whole()[rows, start + wanted])
    logits, _ = extend(TOKENS[:, 80:90], cache, jnp.int32(80))
    close(logits, whole()[:, 80:90])


def test_what_a_cache_held_before_is_not_seen():
    cache = DECODER.empty_cache(3, SLOTS, jnp.dtype("float32"))
    cache = jax.tree.map(lambda x: jnp.full_like(x, 1e3), cache)
    logits, _ = extend(TOKENS[:, :40], cache, jnp.int32(0))
    close(logits, whole()[:, :40])


def test_a_cache_in_eight_bits_is_near():
    cache = DECODER.empty_cache(3, SLOTS, jnp.dtype("int8"))
    logits, cache = extend(TOKENS[:, :40], cache, jnp.int32(0))
    more, cache = extend(TOKENS[:, 40:80], cache, jnp.int32(40))
    assert all(isinstance(layer.keys, Quantized) for layer in cache)
    found = np.concatenate([logits, more], axis=1)
    off = np.abs(found - whole()[:, :80])
    print(f"int8 cache: logits off by {off.max():.4f} at most, {off.mean():.5f} mean")
    assert 0 < off.max() < INT8_LOGITS


def test_attention_is_that_of_the_layers():
    """Of the first layer, from what it reads; of all, that it is causal and whole."""
    sharded, params = model()
    tokens = TOKENS[:, :12]
    found = jax.jit(DECODER.attention)(weights(), tokens)
    assert len(found) == LONG.num_layers
    for seen in found:
        assert seen.shape == (3, LONG.num_heads, 12, 12)
        np.testing.assert_allclose(seen.sum(-1), 1, rtol=0, atol=1e-5)
        assert (np.asarray(seen)[:, :, ~np.tri(12, dtype=bool)] == 0).all()

    @jax.jit
    def first_layer(params):
        layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
        normed = layers.rms_norm(
            params["embed"]["table"][tokens],
            layer["attention_norm"]["scale"],
            eps=LONG.norm_eps,
        )
        angle = layers.rotary_angles(
            jnp.arange(12)[None], head_dim=LONG.head_dim, theta=LONG.rope_theta
        )
        query, key = (
            layers.rotate(
                jnp.einsum("BTD,DNH->BTNH", normed, layer["attention"][name]), angle
            )
            for name in ("query", "key")
        )
        return layers.attention_weights(query, key, mask.causal(12))[0]

    expected = first_layer(params)
    close(found[0], expected.reshape(found[0].shape))


@pytest.mark.slow
def test_bfloat16_is_no_further_off_than_the_modules():
    narrow = dataclasses.replace(DECODER, dtype=jnp.dtype("bfloat16"))
    module = Llama(LONG, dtype=narrow.dtype)
    theirs = np.abs(jax.jit(module.apply)({"params": model()[1]}, TOKENS) - whole())
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights())
    assert jax.eval_shape(narrow.hidden, tree, TOKENS).dtype == jnp.bfloat16
    found = _logits(narrow, tree, TOKENS)
    assert found.dtype == jnp.float32
    ours = np.abs(found - whole())
    assert 0 < ours.mean() < BFLOAT16_MULTIPLE * theirs.mean()


def test_float32_products_are_not_cut_to_bfloat16():
    """A TPU does that by default."""
    cache = DECODER.empty_cache(3, SLOTS, jnp.dtype("float32"))
    program = jax.make_jaxpr(extend)(TOKENS[:, :40], cache, jnp.int32(0))
    products = [
        equation
        for equation in equations(program.jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    assert len(products) > 20
    for product in products:
        assert product.params["precision"][0].name == "HIGHEST"


@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 64, 65, 200])
def test_a_product_is_one_whatever_its_form(num_rows):
    """The forms for few rows and many, and int8, against the product in float64."""
    rng = np.random.default_rng(num_rows)
    scales = 10.0 ** rng.uniform(-2, 2, (48, 1))
    rows = jnp.asarray(rng.normal(size=(48, 96)) * scales, jnp.float32)
    x = jnp.asarray(rng.normal(size=(1, num_rows, 96)), jnp.float32)
    run = jax.jit(multiply)
    kept = Quantized.of(rows)
    with jax.default_matmul_precision("highest"):
        found = {"float32": (run(rows, x), rows), "int8": (run(kept, x), kept)}
    for name, (product, factor) in found.items():
        if isinstance(factor, Quantized):
            factor = factor.widened(jnp.float32)
        exact = np.asarray(x, np.float64) @ np.asarray(factor, np.float64).T
        # Of each output, since each has a scale of its own.
        size = np.abs(exact).max((0, 1))
        off = (np.abs(product - exact) / size).max()
        assert off < {"float32": 3e-6, "int8": 1e-3}[name], (name, off)
