"""What runs beside the computing: who takes part in a collective, and for how long.

Networks are assumed to reach their published bandwidth, with collectives in rings over
all torus dimensions that their devices span.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import numpy as np

from llama_jax.planning import hlo
from llama_jax.planning.topology import Topology

Resource = Literal["ici", "dcn", "host", "dma"]

# Between a chip and its host, bytes a second.
HOST_BANDWIDTH = 16e9

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

# Kind, mesh axes and network: a row of the table of collectives.
CollectiveKey = tuple[str, tuple[str, ...], Resource]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the devices of a mesh are, in the mesh's order.

    Attributes:
      axes: of the mesh, with their sizes.
      coordinates: [devices, dimensions] in the torus of their slice.
      slices: [devices], the slice of each.
    """

    axes: Mapping[str, int]
    coordinates: np.ndarray
    slices: np.ndarray

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh) -> "Placement":
        """Of a mesh of TPU devices."""
        devices = list(mesh.devices.flat)
        return cls(
            dict(mesh.shape),
            np.array([device.coords for device in devices]),
            np.array([getattr(device, "slice_index", 0) or 0 for device in devices]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """Something that runs beside the computing.

    Attributes:
      resource: what it occupies.
      lane: of that; what is on one lane comes one after the other.
      num_bytes: of the whole arrays.
      seconds: predicted.
      label: what it is.
      key: its row in the table of collectives; None for copies.
    """

    resource: Resource
    lane: str
    num_bytes: float
    seconds: float
    label: str
    key: CollectiveKey | None = None


class Network:
    """Which mesh axes, and how fast a network, a collective uses."""

    def __init__(self, topology: Topology, placement: Placement) -> None:
        self._chip = topology.chip
        self._slices = topology.slices
        self._axes = tuple(placement.axes)
        # Of several slices, each runs the same program with its own devices only.
        own = np.flatnonzero(placement.slices == placement.slices[0])
        self._positions = np.stack(
            np.unravel_index(own, tuple(placement.axes.values())), axis=-1
        )
        self._coordinates = placement.coordinates[own]
        grid = placement.slices.reshape(tuple(placement.axes.values()))
        self._dcn_axes = tuple(
            name
            for dim, name in enumerate(self._axes)
            if (grid != np.take(grid, [0], axis=dim)).any()
        )

    def transfer(self, instruction: hlo.Instruction, *, kind: str = "") -> Transfer:
        """A collective within a slice; `kind`, if it is another than it is called."""
        kind = kind or collective_kind(instruction) or ""
        if kind == "collective-permute":
            return self._permutation(instruction)
        group = hlo.first_group(instruction, len(self._coordinates))
        devices = list(range(len(self._coordinates)) if group is None else group)
        num_bytes = _whole_bytes(instruction, group_size=len(devices))
        dims = _num_varying(self._coordinates[devices])
        share = (len(devices) - 1) / len(devices)
        sent = {"all-reduce": 2.0, "all-to-all": 0.25}.get(kind, 1.0) * share
        bandwidth = 2 * self._chip.ici_bandwidth * max(dims, 1)
        return Transfer(
            resource="ici",
            lane="ici",
            num_bytes=num_bytes,
            seconds=sent * num_bytes / bandwidth,
            label=kind,
            key=(kind, self._spanned(self._positions[devices]), "ici"),
        )

    def across_slices(self, send: hlo.Instruction) -> Transfer:
        """One transfer over the data-centre network, from this slice's view."""
        kind = send.find(r'_transfer_type="(\w+)"') or "SEND"
        kind = kind.lower().replace("_", "-")
        num_bytes = send.num_bytes * (self._slices if kind == "all-gather" else 1)
        share = (self._slices - 1) / self._slices
        sent = (2.0 if kind == "all-reduce" else 1.0) * share
        return Transfer(
            resource="dcn",
            lane="dcn",
            num_bytes=num_bytes,
            seconds=sent * num_bytes / self._chip.dcn_bandwidth,
            label=kind,
            key=(kind, self._dcn_axes, "dcn"),
        )

    def _permutation(self, instruction: hlo.Instruction) -> Transfer:
        """Neighbours in both directions at once have a link each."""
        pairs = hlo.permuted_pairs(instruction)
        num_bytes = _whole_bytes(instruction, group_size=1)
        upwards = sum(np.sign(target - source) for source, target in pairs) > 0
        axes = {
            name
            for source, target in pairs
            for name in self._spanned(self._positions[[source, target]])
        }
        return Transfer(
            resource="ici",
            lane="ici up" if upwards else "ici down",
            num_bytes=num_bytes,
            seconds=num_bytes / self._chip.ici_bandwidth,
            label="collective-permute",
            key=(
                "collective-permute",
                tuple(name for name in self._axes if name in axes),
                "ici",
            ),
        )

    def _spanned(self, positions: np.ndarray) -> tuple[str, ...]:
        varies = (positions != positions[0]).any(axis=0)
        return tuple(name for name, v in zip(self._axes, varies, strict=True) if v)


def collective_kind(instruction: hlo.Instruction) -> str | None:
    """What collective an instruction is or begins, if it is one."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in _COLLECTIVES else None


def _whole_bytes(collective: hlo.Instruction, *, group_size: int) -> int:
    """Of the array that is joined or to be split."""
    kind = collective_kind(collective)
    if not collective.opcode.endswith("-start") or kind == "all-reduce":
        return collective.num_bytes * (group_size if kind == "reduce-scatter" else 1)
    # Operands, then results, then scalars for the hardware.
    arrays = [shape.num_bytes for shape in collective.shapes if shape.sizes]
    half = len(arrays) // 2
    return max(sum(arrays[:half]), sum(arrays[half:]))


def _num_varying(coordinates: np.ndarray) -> int:
    """Dimensions of the torus along which devices differ."""
    return int((coordinates != coordinates[0]).any(axis=0).sum())
