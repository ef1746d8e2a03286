"""What a stage makes small, and what it tells of rows that are held out.

B rows, T positions, D model width, V vocabulary.
"""

import abc
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.build import ShardedLlama
from llama_jax.data.batch import Batch
from llama_jax.train.losses import chunked_surprise, surprise
from sharding import axes, context
from sharding.axes import Tree
from sharding.mesh import axis_size

_Rows = TypeVar("_Rows")
_Sum = tuple[Float[Array, ""], Float[Array, ""]]


class Objective(abc.ABC):
    """A loss, and measurements that are sums, so that batches of them add up."""

    @abc.abstractmethod
    def loss(self, sharded: ShardedLlama, params: Tree, batch: Any) -> _Sum:
        """The loss summed over a batch, and what it is to be divided by."""

    def measure(
        self, sharded: ShardedLlama, params: Tree, batch: Any
    ) -> Mapping[str, Array]:
        """What `report` wants of a batch, each a sum over it."""
        loss, weight = self.loss(sharded, params, batch)
        return {"loss": loss, "weight": weight}

    def report(self, sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """What is told of a pass over the held-out rows, from the sums over it."""
        return {"validation_loss": float(sums["loss"] / max(sums["weight"], 1.0))}


class NextToken(Objective):
    """Cross-entropy of the tokens that are to be learnt, in nats."""

    def loss(self, sharded: ShardedLlama, params: Tree, batch: Batch) -> _Sum:
        """The sum of the weighted losses, and of the weights."""
        batch, positions_1T = in_order(sharded, batch)
        surprise_BT = token_surprise(
            sharded, params, batch.tokens, batch.targets, batch.segments, positions_1T
        )
        with jax.named_scope("loss"):
            return jnp.sum(surprise_BT * batch.weights), jnp.sum(batch.weights)


def token_surprise(
    sharded: ShardedLlama,
    params: Tree,
    tokens_BT: Int[Array, "B T"],
    targets_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"] | None = None,
    positions_1T: Int[Array, "1 T"] | None = None,
) -> Float[Array, "B T"]:
    """-log p(target) after each token of rows, nats: what training differentiates.

    Args:
      sharded: the model and its mesh.
      params: laid out as `sharded.param_shardings` says.
      tokens_BT: what the model reads, as `in_order` gives it; so is all else.
      targets_BT: the token after each.
      segments_BT: as `Llama` has them; and so are `positions_1T`.
      positions_1T: of `in_order`.
    """
    model = sharded.model
    read = {"params": params}, tokens_BT, segments_BT, positions_1T
    if sharded.loss_chunks == 1:
        logits_BTV: Any = model.apply(*read)
        with jax.named_scope("loss"):
            return surprise(logits_BTV, targets_BT)
    hidden_BTD: Any = model.apply(*read, method="hidden")
    with jax.named_scope("loss"):
        return chunked_surprise(
            hidden_BTD,
            params["unembed"]["kernel"],
            targets_BT,
            chunks=sharded.loss_chunks,
            parts=axis_size(sharded.mesh, sharded.rules.mesh_axes(axes.VOCAB)),
            constrain=model.constrain,
        )


def in_order(sharded: ShardedLlama, rows: _Rows) -> tuple[_Rows, Array | None]:
    """Rows in the order in which devices share them, and the positions there.

    Done here and not where rows are read: some integers a step change places, and
    everything outside of the program has rows as they are written.

    Args:
      sharded: the model and its mesh.
      rows: a tree of arrays [B, T].
    """
    parts = _parts(sharded)
    if parts == 1:
        return rows, None
    constrain = sharded.model.constrain

    def place(x_BT: Array) -> Array:
        # Whole rows first: XLA aborts where it is to index a split row on a mesh of
        # data x context x tensor.
        x_BT = constrain(x_BT, axes.BATCH, None)
        order_T = context.placement(x_BT.shape[1], parts)
        return constrain(x_BT[:, order_T], axes.BATCH, axes.SEQUENCE)

    length = jax.tree.leaves(rows)[0].shape[1]
    return jax.tree.map(place, rows), jnp.asarray(context.placement(length, parts))[
        None
    ]


def as_written(sharded: ShardedLlama, x_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """What was computed `in_order`, in the order in which rows are written."""
    parts = _parts(sharded)
    if parts == 1:
        return x_BT
    x_BT = sharded.model.constrain(x_BT, axes.BATCH, None)
    return x_BT[:, context.places(x_BT.shape[1], parts)]


def _parts(sharded: ShardedLlama) -> int:
    return axis_size(sharded.mesh, sharded.rules.mesh_axes(axes.SEQUENCE))
