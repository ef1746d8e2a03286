"""Numbers in eight bits: weights that are read faster, a cache that takes less room.

Shape suffixes: A any leading axes, N the numbers that share a scale.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

_MOST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Vectors as whole numbers from -127 to 127, times a scale for each.

    Attributes:
      values: int8[*A, N].
      scale: float32[*A].
    """

    values: Int8[Array, "*A N"]
    scale: Float[Array, "*A"]

    @classmethod
    def of(cls, x: Float[Array, "*A N"]) -> Self:
        """The nearest that there is: off by at most half a scale, largest / 254."""
        wide = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(wide), axis=-1)
        scale = jnp.where(largest > 0, largest, 1.0) / _MOST
        return cls(jnp.round(wide / scale[..., None]).astype(jnp.int8), scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return self.values.shape

    def widened(self, dtype: jnp.dtype) -> Float[Array, "*A N"]:
        """The numbers, in floating point."""
        return (self.values * self.scale[..., None]).astype(dtype)


# What holds the same numbers, exactly or nearly.
Numbers = Array | Quantized
