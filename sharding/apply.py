"""Rules and a mesh, applied: to a tree of parameters, and inside a program."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sharding.axes import MESH_AXES, AxisNames, Tree
from sharding.errors import ShardingError
from sharding.mesh import AnyMesh, axis_size
from sharding.rules import AxisRules


def param_shardings(rules: AxisRules, mesh: AnyMesh, names: Tree, shapes: Tree) -> Tree:
    """A sharding for each parameter.

    Args:
      rules: the strategy.
      mesh: the devices.
      names: a tree whose leaves are tuples of logical axes, one per dimension.
      shapes: the same tree of anything with a `.shape`.

    Raises:
      ShardingError: a dimension that its mesh axes do not divide, with the remedy.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, axis_names, leaf: _sharding(
            rules,
            mesh,
            axis_names,
            leaf.shape,
            where=jax.tree_util.keystr(path, simple=True, separator="."),
        ),
        names,
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def array_sharding(
    rules: AxisRules, mesh: jax.sharding.Mesh, *names: str | None
) -> jax.sharding.NamedSharding:
    """The sharding of an array whose dimensions have these logical axes."""
    return jax.sharding.NamedSharding(mesh, rules.spec(names))


def born_sharded(init: Callable[..., Any], shardings: Any) -> Callable[..., Any]:
    """`init`, compiled so that each device makes only its own part of the result."""
    return jax.jit(init, out_shardings=shardings)


@dataclasses.dataclass(frozen=True)
class Constrain:
    """Pins intermediate arrays of a program to the layout that rules give them.

    Called as `constrain(x, "batch", "sequence", None)`, one logical axis a dimension.
    Frozen, and so a valid static part of a model.
    """

    rules: AxisRules
    mesh: jax.sharding.Mesh

    def __call__(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`x`, with its layout fixed.

        Raises:
          ShardingError: outside `jax.set_mesh` of this mesh, where the constraint would
            silently mean something else, or a dimension that does not divide.
        """
        active = jax.sharding.get_abstract_mesh()
        if active.shape != self.mesh.abstract_mesh.shape:
            inside = "no mesh" if active.empty else f"the mesh {dict(active.shape)}"
            raise ShardingError(
                f"sharding rules for the mesh {dict(self.mesh.shape)} are in force, "
                f"but the program is traced under {inside}: enter it with "
                "`with jax.set_mesh(mesh):`."
            )
        # Inside `per_device`, a part of x is split no further over the axes gone.
        rules = self.rules.without(active.manual_axes)
        sharding = _sharding(rules, self.mesh, names, x.shape, where="activation")
        return jax.lax.with_sharding_constraint(x, sharding.spec)


def constrain(rules: AxisRules, mesh: jax.sharding.Mesh) -> Constrain:
    """A function that pins activations to `rules` on `mesh`; see `Constrain`."""
    return Constrain(rules, mesh)


def per_device(
    body: Callable[..., Any],
    mesh: jax.sharding.Mesh,
    in_specs: Any,
    out_specs: Any,
    *,
    axes: Sequence[str] = MESH_AXES,
) -> Callable[..., Any]:
    """`body`, run by each device, or each group of them, on its own parts.

    Within another `per_device`, over the axes that it has left.

    Args:
      body: a function of parts; it may use collectives over `axes`.
      mesh: the devices.
      in_specs: `jax.P` of each argument.
      out_specs: `jax.P` of each result, the same on axes that it does not name.
      axes: the mesh axes along which `body` sees parts. Along the others it sees
        whole arrays, which the compiler splits as elsewhere.
    """
    gone = jax.sharding.get_abstract_mesh().manual_axes

    def left(spec: jax.P) -> jax.P:
        return jax.P(*(_entry_without(entry, gone) for entry in spec))

    return jax.shard_map(
        body,
        mesh=None if gone else mesh,
        in_specs=jax.tree.map(left, in_specs),
        out_specs=jax.tree.map(left, out_specs),
        axis_names=set(axes) - set(gone),
        check_vma=False,  # kernels do not say how their results vary
    )


def _entry_without(
    entry: str | tuple[str, ...] | None, gone: Sequence[str]
) -> tuple[str, ...] | None:
    group = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(axis for axis in group if axis not in gone) or None


def _sharding(
    rules: AxisRules,
    mesh: AnyMesh,
    names: AxisNames,
    shape: tuple[int, ...],
    *,
    where: str,
) -> jax.sharding.NamedSharding:
    if len(names) != len(shape):
        raise ShardingError(f"{where}: {len(shape)} dimensions, but axes {names}.")
    for name, size in zip(names, shape, strict=True):
        mesh_axes = rules.mesh_axes(name)
        parts = axis_size(mesh, mesh_axes)
        if size % parts:
            raise ShardingError(
                f"{where}: its {name!r} axis of size {size} does not divide over the "
                f"{parts} devices of mesh axes {' x '.join(mesh_axes)}: choose a mesh "
                f"where they multiply to one of {_divisors(size, most=mesh.size)}."
            )
    return jax.sharding.NamedSharding(mesh, rules.spec(names))


def _divisors(size: int, *, most: int) -> list[int]:
    return [n for n in range(1, min(size, most) + 1) if size % n == 0]
