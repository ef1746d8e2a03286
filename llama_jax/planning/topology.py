"""TPU slices by name: what their chips can do, and devices to compile for.

The compiler that runs on TPUs is a library, libtpu, that also runs where there is no
TPU: it compiles for devices that are only described.
"""

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence

import jax
from jax.experimental import topologies

from llama_jax.errors import PlanError

_GIB = 2**30
_CHIPS_PER_HOST = (2, 2, 1)
# What libtpu wants to know where there is no TPU, so that it looks for none; and
# leave for several processes to compile side by side.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One generation of TPU, as published; rates are a second's, of one chip.

    Attributes:
      name: as libtpu calls it.
      peak_flops: bfloat16 operations of the matrix units.
      hbm_bytes: memory that the compiler lets a program have; some less than sold.
      hbm_bandwidth: bytes to or from that memory.
      ici_bandwidth: bytes over one link to a neighbour, one way.
      dcn_bandwidth: bytes to other slices over the data-centre network, one way.
      clock_hz: of the TensorCore, by which the compiler's cycles become seconds.
      cores: TensorCores; the cloud's names of v4 and v5p count them.
      torus_dims: dimensions of the network between chips.
      most_chips: of one slice.
      tdp_watts: power assumed per chip; see `tdp_source`.
      tdp_source: where `tdp_watts` comes from.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    clock_hz: float
    cores: int
    torus_dims: int
    most_chips: int
    tdp_watts: float
    tdp_source: str

    @property
    def counts(self) -> str:
        """What the number in the cloud's name of a slice counts."""
        if self.cores == 1:
            return "chips"
        return f"TensorCores, {self.cores} a chip"


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            peak_flops=275e12,
            hbm_bytes=int(30.75 * _GIB),
            hbm_bandwidth=1.2e12,
            ici_bandwidth=45e9,
            dcn_bandwidth=6.25e9,
            clock_hz=1.05e9,
            cores=2,
            torus_dims=3,
            most_chips=4096,
            tdp_watts=192,
            tdp_source="highest power measured, arXiv 2304.01433, table 4",
        ),
        Chip(
            name="v5e",
            peak_flops=197e12,
            hbm_bytes=int(15.75 * _GIB),
            hbm_bandwidth=0.81e12,
            ici_bandwidth=45e9,
            dcn_bandwidth=3.125e9,
            clock_hz=1.5e9,
            cores=1,
            torus_dims=2,
            most_chips=256,
            tdp_watts=220,
            tdp_source="assumed: Google has published none",
        ),
        Chip(
            name="v5p",
            peak_flops=459e12,
            hbm_bytes=int(95.73 * _GIB),
            hbm_bandwidth=2.8e12,
            ici_bandwidth=90e9,
            dcn_bandwidth=6.25e9,
            clock_hz=1.75e9,
            cores=2,
            torus_dims=3,
            most_chips=6144,
            tdp_watts=500,
            tdp_source="assumed: Google has published none",
        ),
        Chip(
            name="v6e",
            peak_flops=918e12,
            hbm_bytes=int(31.24 * _GIB),
            hbm_bandwidth=1.6e12,
            ici_bandwidth=90e9,
            dcn_bandwidth=12.5e9,
            clock_hz=1.75e9,
            cores=1,
            torus_dims=2,
            most_chips=256,
            tdp_watts=380,
            tdp_source="assumed: Google has published none",
        ),
    )
}
# Names that the cloud has for the same thing.
_ALIASES = {"v5litepod": "v5e", "v5": "v5p", "v6": "v6e"}
# The flat chips' slices; those of the cubic ones follow a rule, see `_shapes`.
_FLAT_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_CUBOIDS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several slices of chips.

    Attributes:
      chip: the generation.
      sizes: chips along each dimension of a slice's torus.
      slices: how many slices, joined by the data-centre network.

    Raises:
      PlanError: the sizes are no slice that exists; names the nearest that are.
    """

    chip: Chip
    sizes: tuple[int, ...]
    slices: int = 1

    def __post_init__(self) -> None:
        if self.slices < 1:
            raise PlanError(f"slices is {self.slices}: give 1 or more.")
        if self.sizes not in set(_shapes(self.chip)):
            shape = "x".join(map(str, self.sizes))
            raise PlanError(
                f"{self.chip.name}:{shape} is no slice: {_shape_rule(self.chip)} "
                f"Nearest are {_nearest(self.chip, math.prod(self.sizes))}."
            )

    @property
    def name(self) -> str:
        """As `parse` takes it: v5p:4x4x8."""
        return f"{self.chip.name}:{'x'.join(map(str, self.sizes))}"

    @property
    def cloud_name(self) -> str:
        """As the cloud sells it: v5p-256, which is v5p:4x4x8."""
        return f"{self.chip.name}-{math.prod(self.sizes) * self.chip.cores}"

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.sizes) * self.slices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which dimensions close to a ring: whole cubes of 4, or a flat pod's 16."""
        if self.chip.torus_dims == 3:
            return (all(size % 4 == 0 for size in self.sizes),) * 3
        return tuple(size == 16 for size in self.sizes)

    @property
    def _chips_per_host(self) -> tuple[int, ...]:
        return (1, 1, 1) if math.prod(self.sizes) == 1 else _CHIPS_PER_HOST


def parse(name: str, slices: int = 1) -> Topology:
    """The topology that a name means.

    Args:
      name: a chip and its torus, "v5p:4x4x8"; or the cloud's name, whose number counts
        TensorCores for v4 and v5p ("v5p-256" is 128 chips) and chips for v5e and v6e.
        Of several shapes with as many chips the usual one is meant, the nearest to a
        cube.
      slices: how many of them.

    Raises:
      PlanError: no such chip or slice; says what is near.
    """
    written = re.fullmatch(r"(v\w+)(?::(\d+(?:x\d+)*)|-(\d+))", name.strip().lower())
    if written is None:
        raise PlanError(
            f"{name!r} is no topology: write a chip and its torus, as v5p:4x4x8 or "
            "v5e:16x16, or the cloud's name, as v5p-256 or v5e-256."
        )
    chip_name, sizes, number = written.groups()
    chip = CHIPS.get(_ALIASES.get(chip_name, chip_name))
    if chip is None:
        raise PlanError(
            f"{name!r} names the chip {chip_name!r}: planning knows {', '.join(CHIPS)}."
        )
    if sizes is not None:
        return Topology(chip, tuple(map(int, sizes.split("x"))), slices)
    num_chips, rest = divmod(int(number), chip.cores)
    shapes = [shape for shape in _shapes(chip) if math.prod(shape) == num_chips]
    if rest or not shapes:
        raise PlanError(
            f"{name!r} is no slice: the number in a name of {chip.name} counts "
            f"{chip.counts}; this would be {int(number) / chip.cores:g} chips. Nearest "
            f"are {_nearest(chip, num_chips)}."
        )
    return Topology(chip, min(shapes, key=sum), slices)


def devices(topology: Topology) -> Sequence[jax.Device]:
    """Devices of the topology that can be compiled for, and nothing else.

    Raises:
      PlanError: libtpu is not installed, or refuses the topology.
    """
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    wrap = [*topology.wrap, False, False, False][:3]
    try:
        description = topologies.get_topology_desc(
            topology_name=topology.name,
            platform="tpu",
            chip_config_name="megacore" if topology.chip.cores == 2 else "default",
            chips_per_host_bounds=topology._chips_per_host,
            num_slices=topology.slices,
            wrap=wrap,
        )
    except RuntimeError as error:
        if "not installed" in str(error):
            raise PlanError(
                f"cannot compile for {topology.name}: libtpu, the TPU compiler, is not "
                "installed. It runs on any x86 Linux, also without a TPU: "
                "pip install 'llama-jax[tpu]'."
            ) from error
        raise PlanError(
            f"libtpu does not know {topology.name}: {error}. Install the one that this "
            "JAX asks for: pip install 'llama-jax[tpu]'."
        ) from error
    return description.devices


def _shapes(chip: Chip) -> Iterator[tuple[int, ...]]:
    """All slices of a chip, in the order in which the cloud writes sizes."""
    if chip.torus_dims == 2:
        yield from _FLAT_SHAPES
        return
    yield from _SMALL_CUBOIDS
    for shape in itertools.combinations_with_replacement(range(4, 25, 4), 3):
        if math.prod(shape) <= chip.most_chips:
            yield shape


def _shape_rule(chip: Chip) -> str:
    if chip.torus_dims == 2:
        return f"{chip.name} is a flat torus of one of a few sizes, 16x16 at most."
    return (
        f"{chip.name} is a torus of three dimensions, each a multiple of 4 and none "
        "less than the one before it, but for the smallest (2x2x1 to 2x4x4)."
    )


def _nearest(chip: Chip, num_chips: int) -> str:
    """The usual slices just below and above a number of chips."""
    usual = {
        num: min((s for s in _shapes(chip) if math.prod(s) == num), key=sum)
        for num in {math.prod(shape) for shape in _shapes(chip)}
    }
    below = [num for num in sorted(usual) if num <= num_chips][-1:]
    above = [num for num in sorted(usual) if num > num_chips][:1]
    near = [Topology(chip, usual[num]) for num in below + above]
    return " and ".join(f"{t.name} ({t.cloud_name})" for t in near)
