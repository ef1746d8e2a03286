"""Keys and values of the positions so far, preallocated, of one layer.

Slot s of a row holds position s of that row, so rows of different lengths need no
bookkeeping. Heads come before slots: attention multiplies matrices of [S, H], which
the TPU compiler then leaves where they lie. Shape suffixes: B batch, T new positions,
S slots, s those of one block, K key/value heads, H head width.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.config import LlamaConfig
from llama_jax.model.int8 import Numbers, Quantized
from sharding import axes
from sharding.axes import AxisNames

# Logical axes of keys and values; of their scales, if any, without the last.
CACHE_AXES: AxisNames = (axes.BATCH, axes.KV_HEADS, axes.SEQUENCE, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer; an argument and a result, never state.

    Attributes:
      keys: [B, K, S, H], rotated.
      values: [B, K, S, H].
    """

    keys: Numbers
    values: Numbers

    @classmethod
    def empty(
        cls,
        config: LlamaConfig,
        *,
        batch: int,
        slots: int,
        dtype: jnp.dtype,
        kv_copies: int = 1,
    ) -> Self:
        """Room for `slots` positions of `batch` rows.

        Args:
          config: of the model.
          batch: rows.
          slots: positions of each.
          dtype: of what is kept; int8 is `Quantized`.
          kv_copies: devices that keep each key/value head, as the model has them.
        """
        num_kv_heads = config.num_kv_heads * kv_copies
        shape = (batch, num_kv_heads, slots, config.head_dim)

        def numbers() -> Numbers:
            zeros = jnp.zeros(shape, dtype)
            return Quantized(zeros, jnp.zeros(shape[:-1])) if dtype == "int8" else zeros

        return cls(numbers(), numbers())

    @property
    def num_slots(self) -> int:
        """Positions that a row has room for, S."""
        return self.keys.shape[2]

    def write(
        self,
        start: Int[Array, ""] | Int[Array, " B"],
        k_BKTH: Float[Array, "B K T H"],
        v_BKTH: Float[Array, "B K T H"],
    ) -> Self:
        """With T positions put at slots start ... start + T - 1.

        The slots must exist: what does not fit is put elsewhere, and nothing says so.

        Args:
          start: one slot for all rows; or, where T is 1, one for each.
          k_BKTH: keys.
          v_BKTH: values.
        """
        new = self.rounded(k_BKTH, v_BKTH)
        put = _put_at_one if jnp.ndim(start) == 0 else _put_at_each
        return jax.tree.map(lambda into, part: put(into, part, start), self, new)

    def rounded(
        self, k_BKTH: Float[Array, "B K T H"], v_BKTH: Float[Array, "B K T H"]
    ) -> "KVCache":
        """T positions by themselves, as this cache would keep them."""
        return KVCache(_like(self.keys, k_BKTH), _like(self.values, v_BKTH))

    def first(self, num_slots: int) -> "KVCache":
        """The first slots of each row."""
        return jax.tree.map(lambda x: x[:, :, :num_slots], self)

    def part(self, start: Int[Array, ""], num_slots: int) -> "KVCache":
        """So many slots of each row from `start` on, which must exist."""
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, num_slots, axis=2), self
        )


def _like(kept: Numbers, new: Array) -> Numbers:
    if isinstance(kept, Quantized):
        return Quantized.of(new)
    return new.astype(kept.dtype)


def _put_at_one(into: Array, part: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(into, part, start, axis=2)


def _put_at_each(into: Array, part: Array, start_B: Array) -> Array:
    # A scatter in place: updates of a slice, row by row, would copy the cache. Each
    # head by itself: with several at once, the TPU compiler wants slots before heads.
    rows_B1 = jnp.arange(part.shape[0], dtype=jnp.int32)[:, None]
    heads_K = jnp.arange(part.shape[1], dtype=jnp.int32)
    return into.at[rows_B1, heads_K, start_B[:, None]].set(
        part[:, :, 0], mode="promise_in_bounds", unique_indices=True
    )
