"""AxisRules: which mesh axes split which logical axis.

A strategy of parallelism is one of these objects. To change the strategy, change the
mapping; model and training step stay as they are.
"""

import dataclasses
import difflib
from collections.abc import Iterable

import jax

from sharding import axes
from sharding.axes import AxisNames
from sharding.errors import ShardingError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """For each logical axis, the mesh axes that split it; () leaves it whole.

    Attributes:
      batch: rows of a batch.
      sequence: positions inside attention and the feed-forward layer.
      residual: positions of the residual stream between them. More axes here than
        in `sequence` is Megatron's sequence parallelism: norms and residual sums run
        on a part of the positions each, and the all-reduce after each layer becomes a
        reduce-scatter and an all-gather (arXiv 2205.05198).
      layers: the stack of blocks.
      embed: the side of a weight that meets the residual stream.
      heads: query heads.
      kv_heads: key and value heads.
      mlp: inner features of the feed-forward layer.
      vocab: pieces of the tokenizer.

    Raises:
      ShardingError: a value that is not a tuple of mesh axes.
    """

    batch: tuple[str, ...]
    sequence: tuple[str, ...]
    residual: tuple[str, ...]
    layers: tuple[str, ...]
    embed: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]
    mlp: tuple[str, ...]
    vocab: tuple[str, ...]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            for axis in getattr(self, field.name):
                if axis not in axes.MESH_AXES:
                    raise ShardingError(
                        f"rule {field.name!r} names {axis!r}, which is no mesh axis: "
                        f"use a tuple of {', '.join(axes.MESH_AXES)}."
                    )

    def mesh_axes(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes that split one logical axis; () for None."""
        if name is None:
            return ()
        if name not in axes.LOGICAL_AXES:
            near = difflib.get_close_matches(name, axes.LOGICAL_AXES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ShardingError(
                f"{name!r} is no logical axis.{hint} The logical axes are "
                f"{', '.join(axes.LOGICAL_AXES)}."
            )
        return getattr(self, name)

    def without(self, mesh_axes: Iterable[str]) -> "AxisRules":
        """The same, with these mesh axes splitting nothing."""
        kept = {
            field.name: tuple(
                axis for axis in getattr(self, field.name) if axis not in mesh_axes
            )
            for field in dataclasses.fields(self)
        }
        return AxisRules(**kept)

    def spec(self, names: AxisNames) -> jax.P:
        """The partition of an array whose dimensions have these logical axes.

        Raises:
          ShardingError: an unknown name, or two dimensions split by one mesh axis.
        """
        split = [self.mesh_axes(name) for name in names]
        used = [axis for group in split for axis in group]
        for axis in used:
            if used.count(axis) > 1:
                raise ShardingError(
                    f"mesh axis {axis!r} would split two dimensions of an array with "
                    f"logical axes {names}: map one of them to another mesh axis."
                )
        return jax.P(*(_entry(group) for group in split))


def _entry(group: tuple[str, ...]) -> str | tuple[str, ...] | None:
    if not group:
        return None
    return group[0] if len(group) == 1 else group


def training_rules(*, sequence_parallel: bool) -> AxisRules:
    """The usual strategy: batch over replicas, weights over fsdp × tensor.

    Args:
      sequence_parallel: split the residual stream over `tensor` too, as Megatron
        does. It saves memory, and changes no result.
    """
    return AxisRules(
        batch=(axes.DATA, axes.FSDP),
        sequence=(axes.CONTEXT,),
        residual=(axes.CONTEXT, axes.TENSOR) if sequence_parallel else (axes.CONTEXT,),
        layers=(),
        embed=(axes.FSDP,),
        heads=(axes.TENSOR,),
        kv_heads=(axes.TENSOR,),
        mlp=(axes.TENSOR,),
        vocab=(axes.TENSOR,),
    )


def decoding_rules() -> AxisRules:
    """For generation: one position at a time, so no sequence is ever split."""
    return dataclasses.replace(
        training_rules(sequence_parallel=False), sequence=(), residual=()
    )
