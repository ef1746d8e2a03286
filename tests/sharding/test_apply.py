"""Rules on a mesh: layouts of trees, of activations, and initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import (
    MeshConfig,
    ShardingError,
    array_sharding,
    born_sharded,
    constrain,
    make_mesh,
    param_shardings,
    per_device,
    training_rules,
)

RULES = training_rules(sequence_parallel=False)
MESH = make_mesh(MeshConfig(fsdp=2, tensor=4))
NAMES = {"in": {"kernel": ("embed", "mlp")}, "norm": {"scale": (None,)}}


def _shapes(rows, columns):
    kernel = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    return {"in": {"kernel": kernel}, "norm": {"scale": jnp.ones(rows)}}


def test_each_parameter_gets_its_layout():
    shardings = param_shardings(RULES, MESH, NAMES, _shapes(6, 8))
    assert shardings["in"]["kernel"].spec == jax.P("fsdp", "tensor")
    assert shardings["norm"]["scale"].spec == jax.P(None)
    assert shardings["in"]["kernel"].shard_shape((6, 8)) == (3, 2)


@pytest.mark.parametrize(
    ("rows", "columns", "says"),
    [
        (
            6,
            10,
            "in.kernel: its 'mlp' axis of size 10 does not divide over the 4 devices "
            "of mesh axes tensor: choose a mesh where they multiply to one of "
            "[1, 2, 5].",
        ),
        (
            9,
            8,
            "in.kernel: its 'embed' axis of size 9 does not divide over the 2 devices "
            "of mesh axes fsdp: choose a mesh where they multiply to one of [1, 3].",
        ),
    ],
)
def test_a_size_that_does_not_divide_is_refused_with_those_that_would(
    rows, columns, says
):
    with pytest.raises(ShardingError) as caught:
        param_shardings(RULES, MESH, NAMES, _shapes(rows, columns))
    assert str(caught.value) == says


def test_names_for_other_dimensions_are_refused():
    shapes = {"in": {"kernel": jnp.ones(8)}, "norm": {"scale": jnp.ones(8)}}
    with pytest.raises(ShardingError, match="in.kernel: 1 dimensions, but axes"):
        param_shardings(RULES, MESH, NAMES, shapes)


@pytest.mark.parametrize(
    "sizes", [{}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_values_born_on_any_mesh_are_the_same(sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    shardings = array_sharding(RULES, mesh, "embed", "mlp")

    def init(key):
        return jax.random.normal(key, (8, 16))

    born = born_sharded(init, shardings)(jax.random.key(3))
    assert born.sharding == shardings
    alone = np.asarray(jax.jit(init)(jax.random.key(3)))
    np.testing.assert_array_equal(np.asarray(born), alone)


def test_constrain_pins_a_layout_inside_a_program():
    pin = constrain(RULES, MESH)
    with jax.set_mesh(MESH):
        pinned = jax.jit(lambda x: pin(x * 2, "batch", "sequence", "mlp"))(
            jnp.ones((4, 3, 8))
        )
    assert pinned.sharding.is_equivalent_to(
        array_sharding(RULES, MESH, "batch", "sequence", "mlp"), 3
    )
    assert pinned.addressable_shards[0].data.shape == (2, 3, 2)


def test_constrain_outside_of_its_mesh_is_refused():
    pin, x = constrain(RULES, MESH), jnp.ones((4, 8))
    with pytest.raises(ShardingError, match=r"under no mesh: .*jax.set_mesh\(mesh\)"):
        jax.jit(lambda x: pin(x, "batch", "mlp"))(x)
    with jax.set_mesh(make_mesh(MeshConfig())):
        with pytest.raises(ShardingError, match="'tensor': 4.*traced under the mesh"):
            jax.jit(lambda x: pin(x, "batch", "mlp"))(x)


def test_an_activation_that_does_not_divide_is_refused():
    pin = constrain(RULES, MESH)
    with jax.set_mesh(MESH):
        with pytest.raises(ShardingError, match="'batch' axis of size 3.*data x fsdp"):
            jax.jit(lambda x: pin(x, "batch", "mlp"))(jnp.ones((3, 8)))


def test_two_of_a_kind_are_equal():
    """A model that holds one is a static argument: equality saves a compilation."""
    assert constrain(RULES, MESH) == constrain(RULES, MESH)
    assert hash(constrain(RULES, MESH)) == hash(constrain(RULES, MESH))


def test_per_device_sees_parts_and_nests():
    """The replicas by hand, and inside of them the heads by hand, and no axis twice."""
    x = jnp.arange(32.0).reshape(4, 8)
    mesh, rows = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), ("data", "fsdp")
    seen = []

    def heads(x):
        seen.append(x.shape)
        return jax.lax.psum(jnp.sum(x, axis=1), "tensor")

    def replica(x):
        pinned = constrain(RULES, mesh)(x, "batch", "mlp")
        seen.append(pinned.shape)
        sums = per_device(heads, mesh, jax.P(rows, "tensor"), jax.P(rows))
        return jax.lax.psum(jnp.sum(sums(pinned)), "data")

    summed = per_device(replica, mesh, jax.P("data"), jax.P(), axes=("data",))
    with jax.set_mesh(mesh):
        total = jax.jit(summed)(x)
    assert seen == [(2, 8), (1, 4)]  # of 4 x 8: by data; then by fsdp and tensor
    assert float(total) == float(x.sum())
