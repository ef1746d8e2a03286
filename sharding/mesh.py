"""MeshConfig: how many devices each axis takes; and the mesh made of it."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from sharding import axes
from sharding.errors import ShardingError

FILL = -1

AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

# Layouts are said by constraints and completed by the compiler.
_AUTO = (jax.sharding.AxisType.Auto,) * len(axes.MESH_AXES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis: within a slice (ICI), and across slices (DCN).

    Each mesh axis has the size of its two factors' product. At most one factor within a
    slice may be -1, "all that are left".

    Attributes:
      data: replicas of the state within a slice.
      fsdp: shards of parameters and optimizer within a slice.
      context: pieces of a sequence.
      tensor: pieces of each layer.
      dcn_data: replicas across slices, joined by the data-centre network.
      dcn_fsdp: shards across slices; worth it only where a slice cannot hold the state.

    Raises:
      ShardingError: a factor that is not positive, or more than one -1.
    """

    data: int = 1
    fsdp: int = FILL
    context: int = 1
    tensor: int = 1
    dcn_data: int = 1
    dcn_fsdp: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            fills = field.name in axes.MESH_AXES
            if not isinstance(size, int) or size < 1 and not (fills and size == FILL):
                choice = "a positive number or -1" if fills else "a positive number"
                raise ShardingError(f"mesh.{field.name} is {size}: give {choice}.")
        if sum(size == FILL for size in self.ici) > 1:
            raise ShardingError(
                f"more than one of {dict(zip(axes.MESH_AXES, self.ici, strict=True))} "
                "is -1: only one axis can take what is left."
            )

    @property
    def ici(self) -> tuple[int, ...]:
        """Factors within a slice, in the order of `axes.MESH_AXES`."""
        return (self.data, self.fsdp, self.context, self.tensor)

    @property
    def dcn(self) -> tuple[int, ...]:
        """Factors across slices, in the order of `axes.MESH_AXES`."""
        return (self.dcn_data, self.dcn_fsdp, 1, 1)

    @property
    def num_slices(self) -> int:
        """Slices that the mesh spans."""
        return math.prod(self.dcn)

    def resolve(self, num_devices: int) -> "MeshConfig":
        """The same with -1 replaced by what `num_devices` leave.

        Raises:
          ShardingError: the factors do not multiply to `num_devices`.
        """
        fixed = math.prod(size for size in self.ici if size != FILL) * self.num_slices
        sizes = ", ".join(
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != 1
        )
        if FILL not in self.ici:
            if fixed != num_devices:
                raise ShardingError(
                    f"the mesh ({sizes or 'all axes 1'}) takes {fixed} devices, but "
                    f"there are {num_devices}: make the factors multiply to "
                    f"{num_devices}, or set one of them to -1."
                )
            return self
        if num_devices % fixed:
            divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
            raise ShardingError(
                f"the mesh ({sizes}) fixes {fixed} devices, which does not divide the "
                f"{num_devices} there are: the fixed factors must multiply to one of "
                f"{divisors}."
            )
        fill = axes.MESH_AXES[self.ici.index(FILL)]
        return dataclasses.replace(self, **{fill: num_devices // fixed})


def num_slices(devices: Sequence[jax.Device]) -> int:
    """How many TPU slices the devices form; 1 where the machine knows none."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def decoding_mesh(
    tensor: int,
    *,
    devices: Sequence[jax.Device] | None = None,
    slices: int | None = None,
) -> jax.sharding.Mesh:
    """Devices for models that write.

    Args:
      tensor: devices that share a copy of the weights; all the others have their own,
        and do as much.
      devices: all of all hosts, if not given.
      slices: that they form; what they say themselves, if not given.

    Raises:
      ShardingError: `tensor` does not divide the devices of a slice.
    """
    devices = jax.devices() if devices is None else devices
    slices = num_slices(devices) if slices is None else slices
    config = MeshConfig(data=FILL, fsdp=1, tensor=tensor, dcn_data=slices)
    return make_mesh(config, devices)


def make_mesh(
    config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """The mesh of `config` over `devices` (all, by default), laid along the torus.

    Raises:
      ShardingError: the factors do not multiply to the number of devices, or the
        slices that the devices form are not those of the DCN factors.
    """
    devices = list(jax.devices() if devices is None else devices)
    config = config.resolve(len(devices))
    slices = num_slices(devices)
    if slices not in (1, config.num_slices):
        raise ShardingError(
            f"the devices form {slices} slices, but dcn_data {config.dcn_data} x "
            f"dcn_fsdp {config.dcn_fsdp} = {config.num_slices}: make the product "
            f"{slices}."
        )
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            config.ici, config.dcn, devices, allow_split_physical_axes=True
        )
    else:
        # One slice, or a machine that knows no slices (CPU): DCN factors are outermost.
        shape = [d * i for d, i in zip(config.dcn, config.ici, strict=True)]
        grid = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
    return jax.sharding.Mesh(
        np.asarray(grid),
        axes.MESH_AXES,
        axis_types=_AUTO,
    )


def abstract_mesh(config: MeshConfig, num_devices: int) -> jax.sharding.AbstractMesh:
    """The mesh of `config` over devices that need not be here: sizes without a machine.

    Raises:
      ShardingError: the factors do not multiply to the number of devices.
    """
    config = config.resolve(num_devices)
    sizes = [dcn * ici for dcn, ici in zip(config.dcn, config.ici, strict=True)]
    return jax.sharding.AbstractMesh(tuple(sizes), axes.MESH_AXES, axis_types=_AUTO)


def axis_size(mesh: AnyMesh, names: Sequence[str]) -> int:
    """Devices along several mesh axes together."""
    return math.prod(mesh.shape[name] for name in names)
