"""Parameters to weights and back, on every mesh, in all bits and in eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.build import build
from llama_jax.generate.weights import (
    abstract_weights,
    from_checkpoint,
    from_params,
    to_params,
)
from llama_jax.model.decoder import LAYER_AXES
from llama_jax.model.int8 import Quantized
from tests.generate.models import (
    CONFIG,
    COPIES,
    EIGHT,
    ONE,
    ROWS,
    model,
    on,
    params_of,
    weights,
)

FLOAT32 = jnp.dtype("float32")
MESHES = on(ONE, EIGHT, COPIES, slow=[ROWS])
INT8 = pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


class Checkpoint:
    """Parameters that are read as a checkpoint's are; and what was read of them."""

    def __init__(self, params):
        self.params = jax.device_get(params)
        self.num_read = 0

    def read(self, path, index=(), *, dtype):
        leaf = self.params
        for key in path.split("/"):
            leaf = leaf[key]
        part = leaf[index].astype(dtype)
        self.num_read += part.nbytes
        return part


@MESHES
def test_there_and_back_changes_no_bit(mesh):
    sharded, params = model(mesh)
    back = to_params(sharded, weights(mesh))
    equal(back, params)
    for leaf, place in zip(
        jax.tree.leaves(back), jax.tree.leaves(sharded.param_shardings), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@MESHES
@INT8
def test_each_device_has_its_part_and_no_other(mesh, int8):
    sharded, _ = model(mesh)
    for layer in weights(mesh, int8=int8).layers:
        for name, names in LAYER_AXES.items():
            array = getattr(layer, name)
            if isinstance(array, Quantized):
                scale = sharded.sharding(*names[:-1])
                assert array.scale.sharding.is_equivalent_to(scale, 1)
                array = array.values
            place = sharded.sharding(*names)
            assert array.sharding.is_equivalent_to(place, array.ndim)


@MESHES
@INT8
def test_weights_of_a_checkpoint_are_those_of_its_parameters(mesh, int8):
    sharded, params = model(mesh)
    checkpoint, seen = Checkpoint(params), []
    loaded = from_checkpoint(
        sharded,
        checkpoint.read,
        dtype=FLOAT32,
        int8=int8,
        watch=lambda done, total: seen.append((done, total)),
    )
    equal(loaded, weights(mesh, int8=int8))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params))
    assert checkpoint.num_read == num_bytes, "something was read twice"
    done, total = zip(*seen, strict=True)
    assert set(total) == {num_bytes} and done[-1] == num_bytes
    assert list(done) == sorted(set(done)) and len(done) == CONFIG.num_layers + 3


@MESHES
@INT8
def test_their_form_is_known_without_them(mesh, int8):
    sharded, _ = model(mesh)
    form = abstract_weights(sharded, FLOAT32, int8=int8)
    real = weights(mesh, int8=int8)
    assert jax.tree.structure(form) == jax.tree.structure(real)
    for a, b in zip(jax.tree.leaves(form), jax.tree.leaves(real), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, b.ndim)


@MESHES
def test_eight_bits_stand_for_something_near(mesh):
    """Of each output its own scale; embeddings and norms as they were."""
    sharded, params = model(mesh)
    kept = weights(mesh, int8=True)
    back = jax.device_get(to_params(sharded, kept))
    given = jax.device_get(params)
    equal(back["embed"], given["embed"])
    equal(back["final_norm"], given["final_norm"])
    # Inputs of each matrix, which share the scale of an output.
    inputs = {"query": 1, "key": 1, "value": 1, "out": (1, 2)} | dict.fromkeys(
        ("gate", "up", "down"), 1
    )
    for part in ("attention", "mlp"):
        for name, leaf in given["blocks"][part].items():
            largest = np.abs(leaf).max(inputs[name], keepdims=True)
            off = np.abs(back["blocks"][part][name] - leaf)
            assert off.max() > 0 and (off <= largest / 254 * 1.001).all(), name
    largest = np.abs(given["unembed"]["kernel"]).max(0)
    off = np.abs(back["unembed"]["kernel"] - given["unembed"]["kernel"])
    assert off.max() > 0 and (off <= largest / 254 * 1.001).all()


@on(EIGHT, COPIES, slow=[ROWS])
def test_eight_bits_are_the_same_on_every_mesh(mesh):
    alone = to_params(model()[0], weights(int8=True))
    equal(to_params(model(mesh)[0], weights(mesh, int8=True)), alone)


def test_one_key_head_on_eight_devices():
    """Copies of copies: eight of the one head there is."""
    config = dataclasses.replace(CONFIG, num_kv_heads=1)
    mesh = model(COPIES)[0].mesh
    sharded = build(config, mesh, model(COPIES)[0].rules, dtype="float32", remat="none")
    assert sharded.model.kv_copies == 8
    params = jax.device_put(params_of(config), sharded.param_shardings)
    equal(to_params(sharded, from_params(sharded, params, int8=False)), params)


def test_bfloat16_stays_bfloat16():
    sharded, params = model()
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    kept = from_params(sharded, narrow, int8=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("bfloat16")}
    equal(to_params(sharded, kept), narrow)
