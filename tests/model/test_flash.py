"""The splash kernel, run as a program on the CPU, against `layers.attend`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import ConfigError
from llama_jax.model import layers, mask, tiles
from llama_jax.model.flash import Blocks, FlashAttention, FlashOrTiles, FlashPart
from llama_jax.model.ring import GatheredAttention
from sharding import MeshConfig, make_mesh, training_rules
from sharding.context import placement, places
from tests.compilation import compiled_anew
from tests.parity import tolerances

B, T, N, K, H = 4, 256, 4, 2, 128
BLOCKS = Blocks(
    query=128,
    key=128,
    key_compute=128,
    query_back=128,
    key_back=128,
    key_compute_back=128,
)


def arrays(dtype):
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def segments():
    """Documents that end in the middle of tiles."""
    ends = np.array([[50], [128], [200], [255]])
    return jnp.asarray(np.arange(T)[None] > ends, jnp.int32)


def value_and_gradients(attend, q, k, v, weight, pattern):
    def summed(q, k, v):
        out = attend(q, k, v, pattern).astype(jnp.float32)
        return jnp.sum(out * weight.astype(jnp.float32)), out

    run = jax.jit(jax.value_and_grad(summed, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = run(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def worst(got, wanted):
    """Largest difference of each array, over the largest value in it."""
    return max(
        np.abs(a - b).max() / np.abs(b).max() for a, b in zip(got, wanted, strict=True)
    )


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_kernel_equals_dot_attention(packed):
    q, k, v, weight = arrays("float32")
    pattern = mask.causal(T, segments() if packed else None)
    flash = FlashAttention(mesh=None, rules=None, blocks=BLOCKS, interpret=True)
    wanted = value_and_gradients(layers.attend, q, k, v, weight, pattern)
    got = value_and_gradients(flash, q, k, v, weight, pattern)
    assert worst(got, wanted) < tolerances.ORDER_GRADIENT_RELATIVE


def test_bfloat16_is_within_two_roundings_of_float32():
    pattern = mask.causal(T)
    exact = value_and_gradients(
        layers.attend, *(x.astype(jnp.float32) for x in arrays("bfloat16")), pattern
    )
    flash = FlashAttention(mesh=None, rules=None, blocks=BLOCKS, interpret=True)
    got = value_and_gradients(flash, *arrays("bfloat16"), pattern)
    assert worst(got, exact) < tolerances.SPLASH_BFLOAT16_RELATIVE


def test_each_device_runs_the_kernel_on_its_rows_and_heads():
    q, k, v, weight = arrays("float32")
    pattern = mask.causal(T, segments())
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rules = training_rules(sequence_parallel=False)
    flash = FlashAttention(mesh=mesh, rules=rules, blocks=BLOCKS, interpret=True)
    wanted = value_and_gradients(layers.attend, q, k, v, weight, pattern)
    with jax.set_mesh(mesh):
        got = value_and_gradients(flash, q, k, v, weight, pattern)
    assert worst(got, wanted) < tolerances.ORDER_GRADIENT_RELATIVE


def test_rows_that_are_not_made_of_tiles_are_refused():
    assert Blocks().within(256) == Blocks(
        **dict.fromkeys(Blocks.__dataclass_fields__, 256)
    )
    with pytest.raises(ConfigError, match="1536 positions do not divide .* of 1024"):
        Blocks().within(1536)
    with pytest.raises(ConfigError, match=r"100 positions .* attention \"dot\""):
        Blocks().within(100)
    lengths = 64, 100, 128, 256, 1024, 1536, 4096
    assert [length for length in lengths if Blocks().divide(length)] == [
        128,
        256,
        1024,
        4096,
    ]


def test_rows_that_are_not_made_of_tiles_go_without_the_kernel():
    flash = FlashAttention(mesh=None, rules=None, blocks=BLOCKS, interpret=True)
    q, k, v, _ = arrays("float32")
    for length, expected in ((T, flash), (64, tiles.attend), (200, tiles.attend)):
        part = (q[:, :length], k[:, :length], v[:, :length], mask.causal(length))
        found = jax.jit(FlashOrTiles(flash=flash))(*part)
        np.testing.assert_array_equal(found, jax.jit(expected)(*part))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_each_device_of_a_row_follows_its_part_of_the_plan(packed):
    """As the kernel of gathered attention: two chunks of queries, all keys."""
    rules = training_rules(sequence_parallel=False)
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    inner = FlashPart(axis="context", blocks=BLOCKS, interpret=True)
    flash = GatheredAttention(mesh=mesh, rules=rules, inner=inner)
    given, ids = arrays("float32"), segments() if packed else None
    wanted = value_and_gradients(layers.attend, *given, mask.causal(T, ids))
    order, back = placement(T, 2), places(T, 2)
    if ids is not None:
        ids = ids[:, order]
    pattern = mask.causal(T, ids, jnp.asarray(order)[None])
    with jax.set_mesh(mesh), compiled_anew():
        placed = [x[:, order] for x in given]
        got = value_and_gradients(flash, *placed, pattern)
    assert worst([x[:, back] for x in got], wanted) < 2e-6
