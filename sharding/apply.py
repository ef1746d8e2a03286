"""Rules and a mesh, applied: to a tree of parameters, and inside a program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from sharding.axes import AxisNames, Tree
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
        if active != self.mesh.abstract_mesh:
            inside = "no mesh" if active.empty else f"the mesh {dict(active.shape)}"
            raise ShardingError(
                f"sharding rules for the mesh {dict(self.mesh.shape)} are in force, "
                f"but the program is traced under {inside}: enter it with "
                "`with jax.set_mesh(mesh):`."
            )
        sharding = _sharding(self.rules, self.mesh, names, x.shape, where="activation")
        return jax.lax.with_sharding_constraint(x, sharding)


def constrain(rules: AxisRules, mesh: jax.sharding.Mesh) -> Constrain:
    """A function that pins activations to `rules` on `mesh`; see `Constrain`."""
    return Constrain(rules, mesh)


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
