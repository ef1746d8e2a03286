"""Keys and values of the positions so far, preallocated.

Slot s of a row holds position s of that row, so rows of different lengths need no
bookkeeping. Shape suffixes: L layers, B batch, T new positions, S slots, K key/value
heads, H head width.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.config import LlamaConfig
from sharding import axes
from sharding.axes import AxisNames

# Logical axes of `keys` and `values`.
CACHE_AXES: AxisNames = (axes.LAYERS, axes.BATCH, axes.SEQUENCE, axes.KV_HEADS, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """All layers' keys and values; an argument and a result, never state.

    Attributes:
      keys: [L, B, S, K, H], rotated.
      values: [L, B, S, K, H].
    """

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]

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
        """Room for `slots` positions of `batch` rows; `kv_copies` as the model has."""
        num_kv_heads = config.num_kv_heads * kv_copies
        shape = (config.num_layers, batch, slots, num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def num_slots(self) -> int:
        """Positions that a row has room for, S."""
        return self.keys.shape[2]

    def write(
        self,
        layer: Int[Array, ""],
        start_B: Int[Array, " B"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
    ) -> Self:
        """With T positions of one layer put at slots start ... start + T - 1.

        The slots must exist: nothing clamps or checks `start`.
        """
        # A scatter in place: updates of a slice, row by row, would copy the cache.
        rows_B1 = jnp.arange(k_BTKH.shape[0], dtype=jnp.int32)[:, None]
        slots_BT = start_B[:, None] + jnp.arange(k_BTKH.shape[1], dtype=jnp.int32)

        def put(into_LBSKH: Array, new_BTKH: Array) -> Array:
            return into_LBSKH.at[layer, rows_B1, slots_BT].set(
                new_BTKH.astype(into_LBSKH.dtype),
                mode="promise_in_bounds",
                unique_indices=True,
            )

        return dataclasses.replace(
            self, keys=put(self.keys, k_BTKH), values=put(self.values, v_BTKH)
        )

    def read(
        self, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of one layer, all slots."""
        return (
            jax.lax.dynamic_index_in_dim(self.keys, layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.values, layer, keepdims=False),
        )
