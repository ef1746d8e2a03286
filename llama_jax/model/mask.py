"""Which key each query may see, described rather than drawn.

A kernel builds the pattern tile by tile from the description; `allowed` draws it
whole, for the reference form and for small sequences. Shape suffixes: B batch (or 1,
the same for all rows), T query position, S key position.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Causal attention, within segments if there are any.

    Attributes:
      query_positions: int32[B, T], place of each query in its row.
      key_positions: int32[B, S], place of each key in its row.
      query_segments: int32[B, T], or None: the document that a query belongs to.
      key_segments: int32[B, S], or None: the document that a key belongs to.
    """

    query_positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None

    def allowed(self) -> Bool[Array, "B T S"]:
        """True where the query may see the key: not later, and in the same segment."""
        allowed_BTS = self.key_positions[:, None, :] <= self.query_positions[:, :, None]
        if self.query_segments is not None and self.key_segments is not None:
            same_BTS = self.query_segments[:, :, None] == self.key_segments[:, None, :]
            allowed_BTS = allowed_BTS & same_BTS
        return allowed_BTS

    def may_allow(self) -> Bool[Array, ""]:
        """False only if no query may see any key, judged by first and last alone.

        Cheap, for skipping tiles: it can be True of a tile in which nothing is allowed.
        """
        may_B1 = _least(self.key_positions) <= _most(self.query_positions)
        if self.query_segments is not None and self.key_segments is not None:
            may_B1 &= _least(self.key_segments) <= _most(self.query_segments)
            may_B1 &= _least(self.query_segments) <= _most(self.key_segments)
        return jnp.any(may_B1)


def _least(x_BT: Int[Array, "B T"]) -> Int[Array, "B 1"]:
    return jnp.min(x_BT, axis=1, keepdims=True)


def _most(x_BT: Int[Array, "B T"]) -> Int[Array, "B 1"]:
    return jnp.max(x_BT, axis=1, keepdims=True)


def causal(
    length: int,
    segments: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
) -> Mask:
    """Each position sees itself and all before it, in its own segment if given.

    Args:
      length: T.
      segments: the document that each token belongs to.
      positions: the place of each token in its row, if they are not in order.
    """
    if positions is None:
        positions = jnp.arange(length, dtype=jnp.int32)[None]
    return Mask(positions, positions, segments, segments)
