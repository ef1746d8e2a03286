"""The loss, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import ConfigError
from llama_jax.train.losses import chunked_surprise, next_token_loss
from sharding import (
    MeshConfig,
    array_sharding,
    axes,
    constrain,
    make_mesh,
    training_rules,
)
from tests import runs

RNG = np.random.default_rng(0)
LOGITS = (RNG.normal(size=(2, 5, 11)) * 5).astype(np.float32)
TARGETS = RNG.integers(0, 11, (2, 5), dtype=np.int32)
WEIGHTS = np.array([[1, 0, 1, 1, 0], [0, 0, 1, 0.5, 0]], np.float32)


def _numpy_loss(weights):
    wide = LOGITS.astype(np.float64)
    log_probs = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, TARGETS[..., None], -1)[..., 0]
    return -(chosen * weights).sum()


def test_sums_of_loss_and_weights():
    total, count = jax.jit(next_token_loss)(LOGITS, TARGETS, WEIGHTS)
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(total, _numpy_loss(WEIGHTS), rtol=1e-6)
    assert float(count) == 4.5


def test_the_gradient_is_probability_minus_target_and_0_where_masked():
    gradient = jax.jit(jax.grad(lambda x: next_token_loss(x, TARGETS, WEIGHTS)[0]))(
        LOGITS
    )
    wide = np.exp(LOGITS.astype(np.float64))
    expected = wide / wide.sum(-1, keepdims=True) - np.eye(11)[TARGETS]
    np.testing.assert_allclose(gradient, expected * WEIGHTS[..., None], atol=1e-6)
    assert np.count_nonzero(np.asarray(gradient)[WEIGHTS == 0]) == 0


def test_nothing_to_predict_is_0_with_a_gradient_of_0():
    nothing = np.zeros_like(WEIGHTS)
    value, gradient = jax.value_and_grad(
        lambda x: next_token_loss(x, TARGETS, nothing)[0]
    )(jnp.asarray(LOGITS))
    assert float(value) == 0
    assert np.count_nonzero(gradient) == 0


def test_logits_too_large_for_an_exponential_stay_finite():
    logits = jnp.array([[[1e4, 0.0, -1e4]]])
    target, weight = jnp.array([[1]]), jnp.ones((1, 1))
    assert float(next_token_loss(logits, target, weight)[0]) == 1e4


# What the whole logits would be made of; 24 pieces in the vocabulary.
HIDDEN = RNG.normal(size=(8, 4, 16)).astype(np.float32)
KERNEL = RNG.normal(size=(16, 24)).astype(np.float32)
NEXT = RNG.integers(0, 24, (8, 4), dtype=np.int32)
COUNTED = (RNG.random((8, 4)) * (RNG.random((8, 4)) < 0.7)).astype(np.float32)


def _plain(hidden, kernel, weights):
    logits = jnp.einsum(
        "BTD,DV->BTV",
        hidden,
        kernel.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    return next_token_loss(logits, NEXT, weights)


def _chunked(**options):
    def loss(hidden, kernel, weights):
        surprise = chunked_surprise(hidden, kernel, NEXT, **options)
        return jnp.sum(surprise * weights), jnp.sum(weights)

    return loss


def _value_and_grads(loss):
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize(("chunks", "parts"), [(1, 1), (4, 1), (24, 1), (3, 2)])
def test_chunks_give_the_loss_and_all_gradients_of_whole_logits(chunks, parts):
    arguments = HIDDEN, KERNEL, COUNTED
    loss = _chunked(chunks=chunks, parts=parts)
    (total, count), grads = _value_and_grads(loss)(*arguments)
    (expected, expected_count), expected_grads = _value_and_grads(_plain)(*arguments)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert float(count) == float(expected_count)
    for gradient, plain in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(gradient, plain, atol=1e-5)
        assert np.abs(plain).max() > 0.5


@pytest.mark.parametrize(
    ("mesh", "sequence_parallel"),
    [
        (MeshConfig(fsdp=8), False),
        (MeshConfig(fsdp=2, tensor=4), True),
        (MeshConfig(data=2, fsdp=1, context=2, tensor=2), False),
    ],
    ids=str,
)
def test_chunks_on_every_mesh(mesh, sequence_parallel):
    devices = make_mesh(mesh)
    rules = training_rules(sequence_parallel=sequence_parallel)
    layout = functools.partial(array_sharding, rules, devices)
    rows = layout(axes.BATCH, axes.SEQUENCE)
    loss = _chunked(
        chunks=3,
        parts=devices.shape[axes.TENSOR],
        constrain=constrain(rules, devices),
    )
    shardings = (
        layout(axes.BATCH, axes.SEQUENCE, None),
        layout(axes.EMBED, axes.VOCAB),
        rows,
    )
    program = jax.jit(
        jax.value_and_grad(loss, (0, 1, 2), has_aux=True), in_shardings=shardings
    )
    with jax.set_mesh(devices):
        (total, _), grads = program(HIDDEN, KERNEL, COUNTED)
    (expected, _), expected_grads = _value_and_grads(_plain)(HIDDEN, KERNEL, COUNTED)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for gradient, plain in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(gradient, plain, atol=1e-5)
    # The kernel's gradient is as split as the kernel.
    assert grads[1].sharding.is_equivalent_to(shardings[1], 2)


def test_chunks_in_bfloat16_sum_in_float32():
    hidden = jnp.asarray(HIDDEN, jnp.bfloat16)
    loss = _chunked(chunks=4)
    (total, _), grads = _value_and_grads(loss)(hidden, KERNEL, COUNTED)
    (expected, _), plain = _value_and_grads(_plain)(hidden, KERNEL, COUNTED)
    # The products are the same, and only the order of float32 sums is another.
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32, jnp.float32]
    for gradient, other in zip(grads[:2], plain[:2], strict=True):
        wide = np.asarray(other, np.float32)
        np.testing.assert_allclose(
            np.asarray(gradient, np.float32), wide, atol=0.01 * np.abs(wide).max()
        )


def test_chunks_never_hold_all_logits():
    shapes = (
        jax.ShapeDtypeStruct((4, 64, 32), jnp.float32),
        jax.ShapeDtypeStruct((32, 4096), jnp.float32),
        jax.ShapeDtypeStruct((4, 64), jnp.float32),
    )
    targets = jnp.zeros((4, 64), jnp.int32)

    def peak(loss) -> int:
        program = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
        return program.memory_analysis().temp_size_in_bytes

    logits = 4 * 64 * 4096 * 4

    def whole(hidden, kernel, weights):
        return next_token_loss(hidden @ kernel, targets, weights)[0]

    def in_chunks(hidden, kernel, weights):
        return jnp.sum(chunked_surprise(hidden, kernel, targets, chunks=16) * weights)

    kernels = 2 * 32 * 4096 * 4
    assert peak(whole) > logits
    assert peak(in_chunks) < logits / 4 + kernels


def test_chunks_that_the_devices_do_not_share_evenly_are_refused():
    with pytest.raises(
        ConfigError, match=r"loss_chunks 8 .* 24 pieces .* 2 devices: .*\[1, 2, 3, 4,"
    ):
        _chunked(chunks=8, parts=2)(HIDDEN, KERNEL, COUNTED)


def test_a_recipe_whose_vocabulary_does_not_split_is_refused():
    recipe = runs.recipe("data")
    assert runs.changed(recipe, "train", loss_chunks=8).train.loss_chunks == 8
    with pytest.raises(ConfigError, match="loss_chunks 7 .* model.vocab_size 400: "):
        runs.changed(recipe, "train", loss_chunks=7)
    with pytest.raises(ConfigError, match="loss_chunks is 0: it must be positive"):
        runs.changed(recipe, "train", loss_chunks=0)
