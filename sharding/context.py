"""The order of a sequence that devices share: balanced causal placement.

Under a causal mask late positions have more to read than early ones, so a row cut into
equal runs would leave the first device idle while the last one works. Instead a row of
T positions is cut into 2 C chunks for C devices, and device i keeps chunks i and
2 C - 1 - i, one early and one late: all devices have equal work. For C = 2:

    positions   0 1 | 2 3 | 4 5 | 6 7
    device 0    0 1         and     6 7
    device 1          2 3 and 4 5

A row in that order is an ordinary array, split evenly; what is where is said by its
positions, which the model takes for its rotary angles and its mask.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from sharding import axes
from sharding.errors import ShardingError
from sharding.mesh import AnyMesh, axis_size
from sharding.rules import AxisRules


def placement(length: int, num_parts: int) -> np.ndarray:
    """The position that each place holds, int32[T].

    `x[:, placement(T, C)]` puts rows in order, and this is what positions they then
    have. For one part it is 0, 1, 2, ...

    Raises:
      ShardingError: T does not divide into 2 C chunks; says what would do.
    """
    if num_parts == 1:
        return np.arange(length, dtype=np.int32)
    chunks = 2 * num_parts
    if length % chunks:
        near = [n for n in (length - length % chunks, length + -length % chunks) if n]
        parts = [n for n in range(1, num_parts + 1) if n == 1 or length % (2 * n) == 0]
        raise ShardingError(
            f"a row of {length} positions does not divide into 2 x {num_parts} = "
            f"{chunks} chunks, two for each device of the mesh axis {axes.CONTEXT!r}: "
            f"make the row {' or '.join(map(str, near))} long, or the axis one of "
            f"{parts}."
        )
    chunk = np.arange(length, dtype=np.int32).reshape(chunks, -1)
    early, late = chunk[:num_parts], chunk[: num_parts - 1 : -1]
    return np.stack([early, late], axis=1).reshape(length)


def places(length: int, num_parts: int) -> np.ndarray:
    """The place that holds each position, int32[T]: the inverse of `placement`.

    `y[:, places(T, C)]` puts rows back in the order of their positions.

    Raises:
      ShardingError: as `placement`.
    """
    return np.argsort(placement(length, num_parts)).astype(np.int32)


def gather(x_Bt: Shaped[Array, "B t *_"], axis: str) -> Shaped[Array, "B T *_"]:
    """Whole rows in the order of their positions, on each device, from its part.

    Inside `jax.shard_map`. Chunks are moved whole: indexing with `places` would gather
    position by position.
    """
    parts_CBt = jax.lax.all_gather(x_Bt, axis)
    early, late = jnp.split(parts_CBt, 2, axis=2)
    chunks = jnp.concatenate([early, late[::-1]])
    return jnp.moveaxis(chunks, 0, 1).reshape(x_Bt.shape[0], -1, *x_Bt.shape[2:])


def require_positions_divide(mesh: AnyMesh, rules: AxisRules, length: int) -> None:
    """Make sure that rows of `length` positions can be split as the rules say.

    Raises:
      ShardingError: they cannot; says the number, and what would do.
    """
    placement(length, axis_size(mesh, rules.mesh_axes(axes.SEQUENCE)))
    split = rules.mesh_axes(axes.RESIDUAL)
    parts = axis_size(mesh, split)
    if length % parts:
        raise ShardingError(
            f"a row of {length} positions does not divide over the {parts} devices of "
            f"mesh axes {' x '.join(split)}, which split the residual stream: make "
            f"the row a multiple of {parts} long, or choose axes that multiply to one "
            f"of {[n for n in range(1, parts + 1) if length % n == 0]}."
        )
