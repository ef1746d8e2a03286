"""Attention in tiles is attention: values, gradients, skipped tiles, odd lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model import layers, mask, tiles

B, T, N, K, H = 2, 48, 4, 2, 8
SEGMENTS = np.repeat([[0, 1, 2], [3, 3, 4]], 16, axis=1).astype(np.int32)


def arrays(dtype=np.float32, *, length=T):
    """q, k, v, and a gradient of the result; large, so that attention is sharp."""
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(2 * rng.normal(size=(B, length, heads, H)), dtype)
        for heads in (N, K, K, N)
    ]


def values_and_gradients(attend, q, k, v, d_out, pattern):
    def weighed(q, k, v):
        out = attend(q, k, v, pattern)
        return jnp.sum(out * d_out), out

    run = jax.jit(jax.grad(weighed, argnums=(0, 1, 2), has_aux=True))
    grads, out = run(q, k, v)
    return {"out": out, **dict(zip("qkv", grads, strict=True))}


def require_close(got, expected, *, relative=1e-5):
    for name, value in expected.items():
        value = np.asarray(value, np.float32)
        np.testing.assert_allclose(
            np.asarray(got[name], np.float32),
            value,
            rtol=0,
            atol=relative * np.abs(value).max(),
            err_msg=name,
        )


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["causal", "segments"])
@pytest.mark.parametrize("tile", [8, 7, 100])
def test_tiles_are_the_whole(tile, segments):
    pattern = mask.causal(T, segments)

    def tiled(*args):
        return tiles.attend(*args, tile=tile)

    require_close(
        values_and_gradients(tiled, *arrays(), pattern),
        values_and_gradients(layers.attend, *arrays(), pattern),
    )


def test_more_keys_than_queries_in_any_order():
    """As where a device has a few of a row's queries, and keys come from all."""
    q, k, v, d_out = arrays()
    order = np.random.default_rng(1).permutation(T)
    here = np.array([5, 6, 7, 40, 41, 42])
    pattern = mask.Mask(jnp.asarray(here)[None], jnp.asarray(order)[None])
    few = (q[:, here], k[:, order], v[:, order], d_out[:, here], pattern)

    def tiled(*args):
        return tiles.attend(*args, tile=3)

    require_close(
        values_and_gradients(tiled, *few), values_and_gradients(layers.attend, *few)
    )


def test_bfloat16_sums_in_float32():
    pattern = mask.causal(T)
    exact = layers.attend(*arrays()[:3], pattern)
    narrow = arrays(jnp.bfloat16)[:3]
    out = tiles.attend(*narrow, pattern, tile=8)
    assert out.dtype == jnp.bfloat16
    error = np.abs(out - exact).max()
    assert error < 1.5 * np.abs(layers.attend(*narrow, pattern) - exact).max()


def test_tiles_in_which_nothing_is_allowed_are_skipped():
    """NaN behind the last query, and in a document that no query is of, is not seen."""
    q, k, v, _ = arrays()
    out = tiles.attend(q, k, v, mask.causal(T), tile=8)
    later = mask.Mask(jnp.arange(16)[None], jnp.arange(T)[None])
    poisoned = v.at[:, 16:].set(jnp.nan)
    np.testing.assert_array_equal(
        tiles.attend(q[:, :16], k, poisoned, later, tile=8), out[:, :16]
    )
    segments = jnp.repeat(jnp.arange(3), 16)[None]
    pattern = mask.causal(T, segments)
    other = mask.Mask(
        pattern.query_positions[:, 32:],
        pattern.key_positions,
        segments[:, 32:],
        segments,
    )
    poisoned = v.at[:, :32].set(jnp.nan)
    np.testing.assert_array_equal(
        tiles.attend(q[:, 32:], k, poisoned, other, tile=8),
        tiles.attend(q, k, v, pattern, tile=8)[:, 32:],
    )


def test_the_result_and_its_normaliser_can_be_saved_by_name():
    """So that a backward pass that finds them does not run the forward kernel again."""
    q, k, v, d_out = arrays()

    def loss(policy):
        def attend(q, k, v):
            return tiles.attend(q, k, v, mask.causal(T), tile=8)

        kept = jax.checkpoint(attend, policy=policy)
        return jax.make_jaxpr(
            jax.grad(lambda *x: jnp.sum(kept(*x) * d_out), argnums=(0, 1, 2))
        )(q, k, v)

    save = jax.checkpoint_policies
    named = loss(save.save_only_these_names(tiles.SAVED))
    nothing = loss(save.nothing_saveable)
    assert str(nothing).count("cond[") == str(named).count("cond[") + 1
