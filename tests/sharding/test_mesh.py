"""Meshes: sizes that resolve, the order of devices, refusals with a remedy."""

import dataclasses

import jax
import numpy as np
import pytest

from sharding import MeshConfig, ShardingError, make_mesh
from sharding.mesh import axis_size


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as the layout of a mesh looks at."""

    id: int
    slice_index: int
    platform: str = "some"
    device_kind: str = "chip"
    process_index: int = 0


@pytest.mark.parametrize(
    ("config", "num_devices", "shape"),
    [
        (MeshConfig(), 1, (1, 1, 1, 1)),
        (MeshConfig(), 8, (1, 8, 1, 1)),
        (MeshConfig(tensor=4), 8, (1, 2, 1, 4)),
        (MeshConfig(fsdp=2, tensor=-1), 8, (1, 2, 1, 4)),
        (MeshConfig(data=-1, fsdp=1), 8, (8, 1, 1, 1)),
        (MeshConfig(fsdp=1, context=-1), 8, (1, 1, 8, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, (2, 2, 1, 2)),
        (MeshConfig(dcn_data=2, data=2, fsdp=-1), 8, (4, 2, 1, 1)),
        (MeshConfig(dcn_fsdp=4, tensor=2), 8, (1, 4, 1, 2)),
    ],
)
def test_factors_resolve_to_the_devices(config, num_devices, shape):
    mesh = make_mesh(config, jax.devices()[:num_devices])
    assert mesh.axis_names == ("data", "fsdp", "context", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices()[:num_devices])
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 4


@pytest.mark.smoke
def test_all_devices_are_taken_by_default():
    mesh = make_mesh(MeshConfig(tensor=2))
    assert mesh.size == len(jax.devices()) == 8
    assert axis_size(mesh, ("fsdp", "tensor")) == 8
    assert axis_size(mesh, ()) == 1


def test_resolving_what_is_resolved_changes_nothing():
    config = MeshConfig(tensor=2).resolve(8)
    assert (config.fsdp, config.resolve(8)) == (4, config)


def test_factors_across_slices_are_outermost():
    chips = [Chip(id=i, slice_index=i // 4) for i in range(8)]
    shuffled = [chips[i] for i in (5, 0, 7, 2, 1, 4, 3, 6)]
    replicas = make_mesh(MeshConfig(dcn_data=2, fsdp=2, tensor=2), shuffled)
    slices = np.vectorize(lambda chip: chip.slice_index)(replicas.devices)
    assert replicas.devices.shape == (2, 2, 1, 2)
    assert (slices[0] == slices[0].flat[0]).all()
    assert (slices[1] == 1 - slices[0].flat[0]).all()

    # Two factors on one axis: the one across slices counts slower.
    shards = make_mesh(MeshConfig(dcn_fsdp=2, fsdp=4), shuffled)
    slices = np.vectorize(lambda chip: chip.slice_index)(shards.devices).ravel()
    assert list(slices[:4]) == [slices[0]] * 4
    assert list(slices[4:]) == [1 - slices[0]] * 4


def test_a_machine_without_slices_lays_them_out_as_if_it_had_them():
    mesh = make_mesh(MeshConfig(dcn_data=2, tensor=2))
    assert list(mesh.devices[0].flat) == jax.devices()[:4]


def test_slices_that_the_factors_do_not_name_are_refused():
    chips = [Chip(id=i, slice_index=i // 2) for i in range(8)]
    with pytest.raises(ShardingError, match=r"4 slices, but .* = 2: make .* 4\."):
        make_mesh(MeshConfig(dcn_data=2), chips)
    with pytest.raises(ShardingError, match=r"dcn_data 1 x dcn_fsdp 1 = 1: make"):
        make_mesh(MeshConfig(), chips)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (MeshConfig(fsdp=2), r"fsdp=2\) takes 2 devices, but there are 8.*or set one"),
        (MeshConfig(fsdp=1), r"all axes 1\) takes 1 devices.*multiply to 8"),
        (MeshConfig(tensor=3), r"fixes 3 devices.*multiply to one of \[1, 2, 4, 8\]"),
        (MeshConfig(dcn_data=16), r"dcn_data=16\) fixes 16 devices.*\[1, 2, 4, 8\]"),
    ],
)
def test_factors_that_do_not_fit_are_refused_with_a_remedy(config, says):
    with pytest.raises(ShardingError, match=says):
        make_mesh(config)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"tensor": 0}, "mesh.tensor is 0: give a positive number or -1"),
        ({"data": -2}, "mesh.data is -2"),
        ({"dcn_data": -1}, r"mesh.dcn_data is -1: give a positive number\."),
        ({"fsdp": 2.0}, "mesh.fsdp is 2.0"),
        ({"tensor": -1}, "only one axis can take what is left"),
    ],
)
def test_impossible_factors_are_refused(sizes, says):
    with pytest.raises(ShardingError, match=says):
        MeshConfig(**sizes)
